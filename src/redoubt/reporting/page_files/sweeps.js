// Runs that differ in one numeric key (a curve) or in two (a heat map), mean over seeds; further keys are fixed.

function setUpSweeps() {
  const text = ({ keys, title, points }) => `${keys.join(" × ")}: ${title} (${points.length} points)`;
  byId("sweeps").hidden = !DATA.sweeps.length;
  document.querySelector('nav a[href="#sweeps"]').hidden = !DATA.sweeps.length;
  fill(byId("sweep"), DATA.sweeps.map((s, i) => [i, text(s)]));
  for (const id of ["sweep", "sweep-metric"]) byId(id).addEventListener("change", showSweep);
}

function showSweep() {
  const sweep = DATA.sweeps[byId("sweep").value], protocol = byId("protocol").value, select = byId("sweep-metric");
  if (!sweep) return;
  const of = sweep.points.map((p) => metricsUnder(protocol, p.runs.map((i) => RUNS[i])));
  const metrics = Object.keys(DATA.metrics).filter((m) => of.some((there) => there.includes(m)));
  const pointsWith = (m) => of.filter((there) => there.includes(m)).length, attacks = metrics.filter((m) => m !== "natural");
  const most = Math.max(...attacks.map(pointsWith)), usual = robustOf(attacks.filter((m) => pointsWith(m) === most)) ?? metrics[0];
  // A choice stays as long as it is the same sweep's.
  const kept = select.dataset.sweep === byId("sweep").value && metrics.includes(select.value);
  const text = (m) => metricTitle(m) + (pointsWith(m) < of.length ? ` (${pointsWith(m)} of ${of.length} points)` : "");
  fill(select, metrics.map((m) => [m, text(m)]), kept ? select.value : usual);
  select.dataset.sweep = byId("sweep").value;
  const metric = select.value;
  const points = sweep.points.flatMap(({ at, runs }) => {
    const found = meanOf(runs.map((i) => accuracy(RUNS[i], metric, protocol)));
    return found ? [{ at, found }] : [];
  });
  const nothing = el("p", { className: "muted", textContent: "None of its runs was evaluated by this suite." });
  const make = sweep.keys.length === 1 ? sweepCurve : sweepMap;
  const heading = caption(`${metricTitle(metric)}, ${sweep.title}; ${labelOf(protocol)}`);
  draw(byId("sweep-chart"), (width) => (points.length ? [heading, ...make(width, sweep, points, metricTitle(metric))] : [nothing]));
}

function sweepCurve(width, { keys: [key] }, points, name) {
  const xs = points.map((p) => p.at[0]), positive = xs.filter((x) => x > 0);
  const log = Math.min(...xs) >= 0 && positive.length > 1 && Math.min(...positive) * 20 < Math.max(...positive);
  const series = { [name]: points.map(({ at, found }) => [at[0], found.mean, found.sd]) };
  return lines(width, series, { xLabel: key, yLabel: name, percent: true, log, full: false });
}

function sweepMap(width, { keys }, points, name) {
  const [rows, columns] = [0, 1].map((axis) => [...new Set(points.map((p) => p.at[axis]))].sort((a, b) => a - b));
  const cellAt = (r, c) => {
    const found = points.find((p) => p.at[0] === r && p.at[1] === c)?.found;
    return found ? { value: found.mean, text: `${name} ${meanText(found)}` } : null;
  };
  const values = [...rows].reverse().map((r) => columns.map((c) => cellAt(r, c)));
  const texts = { rows: [...rows].reverse().map(short), columns: columns.map(short), yLabel: keys[0], xLabel: keys[1] };
  return heatMap(width, { ...texts, values, show: percent });
}
