// Everything of one run.

/** Through the address, so that a run can be linked and the browser's back button works. */
function openRun(run) {
  const hash = `#run=${encodeURIComponent(run.name)}`;
  if (location.hash === hash) followAddress();
  else location.hash = hash;
}

async function showRun(run) {
  const box = byId("run-details"), details = await detailsOf(run);
  byId("run").value = run.name;
  const compareIt = () => { byId("first").value = run.name; byId("compare").scrollIntoView(); showComparison(); byId("second").focus(); };
  box.replaceChildren(
    el("h3", { textContent: run.name }), facts(run),
    el("button", { type: "button", textContent: "Compare with another run", onclick: compareIt }),
    ...evaluationsTable(run), ...curves(details), ...updateMap(details), ...audits(details), ...(await examples(run)), configTable(details));
  for (const row of document.querySelectorAll("#table tbody tr")) {
    row.setAttribute("aria-selected", String([...row.querySelectorAll(".open")].some((b) => b.title === run.name)));
  }
  box.querySelectorAll(".chart").forEach((chart) => draw(chart, chart.make));
}

function facts(run) {
  const fact = (name, value) => el("span", {}, el("span", { className: "muted" }, `${name} `), el("b", {}, String(value ?? MISSING)));
  const epochs = run.epoch == null ? MISSING : `${run.epoch} of ${run.epochs ?? MISSING}`;
  return el("div", { className: "facts" }, ...AXES.map((a) => fact(a, run.axes[a])), run.sweep ? fact("sweep", run.sweep) : null,
    fact("state", run.state), run.reason ? fact("reason", run.reason) : null, fact("epochs", epochs),
    fact("training", clock(run.train_seconds)), fact("started", run.started?.slice(0, 16).replace("T", " ")));
}

function evaluationsTable(run) {
  if (!run.evaluations.length) return [el("p", { className: "muted", textContent: "Not evaluated." })];
  const accuracies = (e) => el("div", {}, ...Object.entries(e.metrics).map(([name, [value, low, high]]) =>
    el("div", { textContent: `${metricTitle(name)} ${percent(value)}${low == null ? "" : ` [${percent(low)}, ${percent(high)}]`}` })));
  const audit = (e) => (e.audit_failed.length ? `failed: ${e.audit_failed.join(", ")}` : e.audit);
  const rows = run.evaluations.map((e) => [DATA.protocols[e.protocol] + (e === standingOf(run) ? " (stands for the run)" : ""), accuracies(e), String(e.n), `${e.checkpoint}, ${e.weights}`, audit(e), clock(e.seconds)]);
  return [el("h3", { textContent: "Evaluations, the newest first" }),
    tableOf(["suite", "accuracy in % and 95 % interval", "images", "checkpoint, weights", "audit", "time"], rows, [2, 5])];
}

/** A chart that is drawn once it stands in the page. */
const later = (make) => Object.assign(el("div", { className: "chart" }), { make });

const panelOf = (panel) => el("div", {}, el("h4", { textContent: panel.title }), later((width) =>
  lines(width, panel.series, { xLabel: panel.x, yLabel: panel.y, percent: panel.percent, log: panel.log, mark: panel.mark })));

function curves({ panels }) {
  const part = (title, figures) => {
    const found = panels.filter((p) => figures.includes(p.figure));
    return found.length ? [el("h3", { textContent: title }), el("div", { className: "panels" }, ...found.map(panelOf))] : [];
  };
  return [...part("Learning curves", ["curves", "loss"]), ...part("Feature gap", ["gap"]),
    ...part("Audit: accuracy over eps and iterations", ["eps", "iterations"])];
}

function updateMap({ updates: { epochs, layers } }) {
  if (!epochs.length) return [];
  const rows = Object.keys(layers), values = rows.map((r) => layers[r].map((v) => (v == null ? null : { value: v, text: `${percent(v)} % updated` })));
  const make = (width) => heatMap(width, { rows, columns: epochs.map(String), values, xLabel: "epoch", yLabel: "layer", show: (v) => `${percent(v)} %`, range: [0, 1] });
  return [el("h3", { textContent: "Share of entries that CURE updates" }), later(make)];
}

function audits({ audits: all }) {
  const one = (audit) => {
    const rows = audit.checks.map((c) => [c.name, c.value == null ? MISSING : short(c.value), c.limit == null ? MISSING : short(c.limit),
      el("span", { className: c.passed === false ? "bad" : c.passed ? "good" : "" }, c.passed === false ? "FAILED" : c.passed ? "ok" : "skipped"), c.rule]);
    const verdict = audit.failed.length ? `failed: ${audit.failed.join(", ")}` : "passed";
    return el("details", {}, el("summary", {}, `${audit.id}, ${audit.place}: `, el("span", { className: audit.failed.length ? "bad" : "good" }, verdict)),
      tableOf(["check", "measured", "limit", "", "what must hold"], rows, [1, 2], "wrap"));
  };
  return all.length ? [el("h3", { textContent: "Audits" }), ...all.map(one)] : [];
}

/** Draws uint8 [3, H, W] into a canvas; `of(byte index)` gives the value. */
function painted(shape, of) {
  const [, height, width] = shape, canvas = el("canvas", { width, height }), context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    for (let channel = 0; channel < 3; channel++) image.data[4 * i + channel] = of(channel * height * width + i);
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

async function examples(run) {
  if (!run.examples) return [];
  const { place, clean: id, labels, predicted, added } = run.examples, { shape, pixels } = DATA.clean[id];
  const clean = await inflated(pixels), size = shape[1] * shape[2] * shape[3];
  const figure = (canvas, ...text) => el("figure", {}, canvas, el("figcaption", {}, ...text));
  const parts = [];
  for (const [attack, text] of Object.entries(added)) {
    const sums = await inflated(text), adversarial = clean.map((v, i) => (v + sums[i]) & 255);
    const largest = adversarial.reduce((most, v, i) => Math.max(most, Math.abs(v - clean[i])), 1), times = Math.max(1, Math.floor(127 / largest));
    const shown = labels.map((label, k) => {
      const at = k * size, first = (i) => clean[at + i], last = (i) => adversarial[at + i], right = predicted[attack][k] === label;
      return el("div", { className: "example" },
        figure(painted(shape.slice(1), first), `${label} → ${predicted.clean[k]}`),
        figure(painted(shape.slice(1), (i) => 128 + times * (last(i) - first(i))), `difference × ${times}`),
        figure(painted(shape.slice(1), last), el("span", { className: right ? "good" : "bad" }, `${label} → ${predicted[attack][k]}`)));
    });
    parts.push(el("h4", { textContent: `${metricTitle(attack)} of ${place}` }), el("div", { className: "examples" }, ...shown));
  }
  return [el("h3", { textContent: "Adversarial examples: clean, difference, adversarial; label → predicted" }), ...parts];
}

function configTable({ config }) {
  const rows = Object.entries(config).map(([key, value]) => [el("code", { textContent: key }), el("code", { textContent: value })]);
  return el("details", {}, el("summary", { textContent: `Config, ${rows.length} keys` }), tableOf(["key", "value"], rows, [], "wrap"));
}
