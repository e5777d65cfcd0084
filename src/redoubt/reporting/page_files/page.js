// Brings the parts together: what can be chosen, theme, and the run that the address names.

const THEMES = { auto: "", light: "light", dark: "dark" };

function setUpTheme() {
  const names = Object.keys(THEMES);
  let stored = null;
  try { stored = localStorage.getItem("redoubt-theme"); } catch { /* a browser may forbid it to files */ }
  const set = (name) => {
    document.documentElement.style.colorScheme = THEMES[name];
    byId("theme").textContent = `Theme: ${name}`;
    byId("theme").onclick = () => {
      const next = names[(names.indexOf(name) + 1) % names.length];
      set(next);
      try { localStorage.setItem("redoubt-theme", next); } catch { /* then it lasts as long as the page */ }
    };
  };
  set(names.includes(stored) ? stored : "auto");
}

function setUpFilters() {
  const axes = [...AXES, "state", ...(RUNS.some((r) => r.sweep) ? ["sweep"] : [])];
  for (const axis of axes) {
    const values = [...new Set(RUNS.map((r) => valueOf(r, axis)).filter((v) => v != null))].sort((a, b) => String(a).localeCompare(String(b), "en", { numeric: true }));
    const select = el("select", { "data-axis": axis });
    fill(select, [["", "all"], ...values.map((v) => [v, v])], "");
    byId("filters").append(el("label", {}, axis, select));
  }
  fill(byId("protocol"), [...DATA.protocols.map((text, i) => [i, text]), ["any", `any: ${labelOf("any")}`]], DATA.protocols.length ? 0 : "any");
  byId("filters").addEventListener("input", showTable);
  byId("mean").addEventListener("change", showTable);
  byId("protocol").addEventListener("change", showSweep);
  byId("scatter-metric").addEventListener("change", showTable);
}

function setUpRuns() {
  const names = RUNS.map((r) => [r.name, r.name]);
  fill(byId("run"), [["", "choose a run"], ...names], "");
  for (const id of ["first", "second"]) {
    fill(byId(id), [["", "choose a run"], ...names], "");
    byId(id).addEventListener("change", showComparison);
  }
  byId("run").addEventListener("change", () => openRun({ name: byId("run").value }));
  byId("run-details").replaceChildren(el("p", { className: "muted", textContent: "Choose a run here, in the table or in the scatter." }));
}

async function followAddress() {
  if (!location.hash.startsWith("#run=")) return;
  const run = RUNS.find((r) => r.name === decodeURIComponent(location.hash.slice(5)));
  if (!run) return;
  await showRun(run);
  byId("details").scrollIntoView();
  byId("details-title").focus({ preventScroll: true });
}

function tellSummary() {
  const states = Object.entries(Object.groupBy(RUNS, (r) => r.state)).map(([state, runs]) => `${runs.length} ${state}`);
  byId("summary").textContent = `${RUNS.length} runs: ${states.join(", ")}`;
  byId("made").textContent = `Made ${DATA.made} by redoubt ${DATA.version}.`;
  const { verdicts, examples } = DATA.left_out, left = [];
  if (verdicts) left.push(`the verdicts of the ${verdicts} oldest runs that have some (they cannot be compared here)`);
  if (examples) left.push(`the adversarial examples of the ${examples} oldest`);
  byId("notice").hidden = !left.length;
  byId("notice").textContent = `To keep this file small it leaves out ${left.join(", and ")}; limit_mb=... raises the limit.`;
}

setUpTheme();
setUpFilters();
setUpRuns();
setUpSweeps();
tellSummary();
showTable();
showSweep();
showComparison();
window.addEventListener("hashchange", followAddress);
followAddress();
