// The table of runs and the scatter of the same rows.

const view = { column: null, descending: true };

/** A cell: what is shown, what is sorted by, and what hovering tells. */
const cell = (text, value = text, title = null, note = null) => ({ text, value, title, note });

/** The rows: single runs, or runs that differ in their seed only; all of a row are in what is filtered. */
function rowsOf(runs) {
  if (!byId("mean").checked) return runs.map((run) => [run]);
  return Object.values(Object.groupBy(runs, (run) => run.group));
}

function filtered() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const selects = [...document.querySelectorAll("#filters select[data-axis]")].filter((s) => s.value !== "");
  return RUNS.filter((run) => {
    const text = [run.name, run.state, run.reason, run.sweep].join(" ").toLowerCase();
    return words.every((w) => text.includes(w)) && selects.every((s) => String(valueOf(run, s.dataset.axis)) === s.value);
  });
}

const valueOf = (run, axis) => (axis === "state" || axis === "sweep" ? run[axis] : run.axes[axis]);

function axisCell(runs, axis) {
  const values = [...new Set(runs.map((run) => valueOf(run, axis)))];
  return cell(values.join(", "), values.length > 1 ? values.join(", ") : values[0]);
}

function stateCell(runs) {
  if (runs.length > 1) return cell(Object.entries(Object.groupBy(runs, (r) => r.state)).map(([s, rs]) => `${rs.length} ${s}`).join(", "));
  const { state, epoch, epochs, reason } = runs[0];
  return cell(state === "done" || epoch == null ? state : `${state}, epoch ${epoch}/${epochs}`, state, null, reason);
}

function metricCell(runs, metric, protocol) {
  const found = meanOf(runs.map((run) => accuracy(run, metric, protocol)));
  if (!found) return cell(MISSING, null);
  if (runs.length > 1) return cell(meanText(found), found.mean, `${found.n} of ${runs.length} seeds`);
  const e = evaluationWith(runs[0], metric, protocol), [value, low, high, outside] = e.metrics[metric];
  const interval = low == null ? "" : `[${percent(low)}, ${percent(high)}], `;
  const note = outside ? `; ${outside} left the ball` : "";
  return cell(percent(value) + (outside ? "*" : ""), value, `${interval}${DATA.protocols[e.protocol]}, ${e.n} images, ${e.weights} weights of ${e.checkpoint}, ${e.id}${note}`);
}

function nrrCell(runs, name, protocol) {
  const found = meanOf(runs.map((run) => evaluationsOf(run, protocol).find((e) => name in e.nrr)?.nrr[name]));
  return cell(runs.length > 1 ? meanText(found) : percent(found?.mean), found?.mean ?? null);
}

function auditCell(runs, protocol) {
  const marks = runs.map((run) => {
    const evaluations = evaluationsOf(run, protocol), mark = evaluations[0]?.audit;
    return protocol === "any" ? evaluations.find((e) => e.audit !== "not audited")?.audit ?? mark : mark;
  });
  const text = [...new Set(marks.map((m) => m ?? MISSING))].join(", ");
  const failed = [...new Set(runs.flatMap((run) => evaluationsOf(run, protocol).flatMap((e) => e.audit_failed)))];
  return cell(text, text === MISSING ? null : text, null, failed.join(", ") || null);
}

function timeCell(runs, of) {
  const found = meanOf(runs.map(of));
  return cell(runs.length > 1 ? meanText(found, clock) : clock(found?.mean), found?.mean ?? null);
}

/** The columns under a protocol: {key, title, number, of(runs) -> cell}. */
function columns(protocol) {
  const text = (key, title, of) => ({ key, title, of }), number = (key, title, of) => ({ key, title, of, number: true });
  const nrr = [...new Set(RUNS.flatMap((r) => evaluationsOf(r, protocol).flatMap((e) => Object.keys(e.nrr))))];
  return [
    text("name", "run", (runs) => cell("", runs[0].name)),
    ...AXES.map((axis) => text(axis, axis, (runs) => axisCell(runs, axis))),
    ...(RUNS.some((r) => r.sweep) ? [text("sweep", "sweep", (runs) => axisCell(runs, "sweep"))] : []),
    ...metricsUnder(protocol).map((m) => number(m, metricTitle(m), (runs) => metricCell(runs, m, protocol))),
    ...nrr.map((name) => number(`nrr ${name}`, `NRR (${metricTitle(name)})`, (runs) => nrrCell(runs, name, protocol))),
    text("audit", "audit", (runs) => auditCell(runs, protocol)),
    text("state", "state", stateCell),
    number("train", "training, h:mm:ss", (runs) => timeCell(runs, (r) => r.train_seconds)),
    number("attack", "attacks, h:mm:ss", (runs) => timeCell(runs, (r) => evaluationsOf(r, protocol)[0]?.seconds)),
  ];
}

/** Missing values stand last, whichever way the others go. */
function compared(a, b) {
  if (a == null || b == null) return (a == null) - (b == null);
  const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  return view.descending ? -order : order;
}

function showTable() {
  const protocol = byId("protocol").value, shown = columns(protocol), runs = filtered();
  if (!shown.some((c) => c.key === view.column)) view.column = robustOf(metricsUnder(protocol)) ?? "name";
  const by = shown.find((c) => c.key === view.column);
  const rows = rowsOf(runs).map((r) => [r, by.of(r).value]).sort(([, a], [, b]) => compared(a, b)).map(([r]) => r);
  byId("count").textContent = `${runs.length} of ${RUNS.length} runs${rows.length < runs.length ? ` in ${rows.length} rows` : ""}`;
  byId("table").replaceChildren(heading(shown), el("tbody", {}, ...rows.map((r) => tableRow(r, shown))));
  showScatter(rows, protocol);
}

function heading(shown) {
  const head = (c) => {
    const sort = () => {
      view.descending = view.column === c.key ? !view.descending : Boolean(c.number);
      view.column = c.key;
      showTable();
      document.querySelector(`#table th[data-key="${CSS.escape(c.key)}"] button`).focus();
    };
    const direction = c.key === view.column ? (view.descending ? "descending" : "ascending") : "none";
    return el("th", { scope: "col", className: c.number ? "number" : "", "aria-sort": direction, "data-key": c.key },
      el("button", { type: "button", textContent: c.title, onclick: sort }));
  };
  return el("thead", {}, el("tr", {}, ...shown.map(head)));
}

function tableRow(runs, shown) {
  const open = (run) => el("button", {
    type: "button", className: "open", title: run.name, "aria-label": `Show ${run.name}`,
    textContent: runs.length > 1 ? `s${run.axes.seed}` : run.state === "weights" ? run.name : run.name.slice(-10), onclick: () => openRun(run),
  });
  const cells = shown.map((c, i) => {
    const { text, title, note } = c.of(runs);
    if (!i) return el("td", {}, ...runs.map(open));
    const mark = c.key === "audit" ? { passed: "good", failed: "bad" }[text] : text === "failed" ? "bad" : null;
    return el("td", { className: [c.number && "number", mark].filter(Boolean).join(" "), title }, String(text ?? MISSING),
      note ? el("span", { className: "small muted", textContent: note }) : null);
  });
  return el("tr", { "aria-selected": String(runs.some((r) => r.name === byId("run").value)) }, ...cells);
}

function showScatter(rows, protocol) {
  const metrics = metricsUnder(protocol).filter((m) => m !== "natural"), select = byId("scatter-metric");
  fill(select, metrics.map((m) => [m, metricTitle(m)]), metrics.includes(select.value) ? select.value : robustOf(metrics));
  const metric = select.value, defenses = [...new Set(RUNS.map((r) => r.axes.defense))].sort(), bases = [...new Set(RUNS.map((r) => r.axes.base))].sort();
  const points = rows.flatMap((runs) => {
    const x = meanOf(runs.map((r) => accuracy(r, "natural", protocol))), y = meanOf(runs.map((r) => accuracy(r, metric, protocol)));
    if (!x || !y) return [];
    const { defense, base, model, data } = runs[0].axes;
    return [{
      x: 100 * x.mean, y: 100 * y.mean, dx: 100 * x.sd, dy: 100 * y.sd, colour: defenses.indexOf(defense), shape: bases.indexOf(base),
      text: `${defense} + ${base}, ${model}, ${data}\nNatural ${meanText(x)}\n${metricTitle(metric)} ${meanText(y)}`, open: () => openRun(runs[0]),
    }];
  });
  const labels = { xLabel: "Natural accuracy in %", yLabel: `${metricTitle(metric)} in %`, title: labelOf(protocol), colours: defenses, shapes: bases };
  draw(byId("scatter-chart"), (width) => (points.length ? scatter(width, points, labels) : [el("p", { className: "muted", textContent: "None of these runs has both accuracies." })]));
}
