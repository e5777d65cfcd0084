// Runs that differ in one numeric key (a curve) or in two (a heat map), mean over seeds.

function setUpSweeps() {
  const text = ({ keys, cell, points }) => `${keys.join(" × ")}: ${cell.defense} + ${cell.base}, ${cell.model}, ${cell.data} (${points.length} points)`;
  byId("sweeps").hidden = !DATA.sweeps.length;
  document.querySelector('nav a[href="#sweeps"]').hidden = !DATA.sweeps.length;
  fill(byId("sweep"), DATA.sweeps.map((s, i) => [i, text(s)]));
  for (const id of ["sweep", "sweep-metric"]) byId(id).addEventListener("change", showSweep);
}

function showSweep() {
  const sweep = DATA.sweeps[byId("sweep").value], protocol = byId("protocol").value, select = byId("sweep-metric");
  if (!sweep) return;
  const metrics = metricsUnder(protocol, sweep.points.flatMap((p) => p.runs.map((i) => RUNS[i])));
  fill(select, metrics.map((m) => [m, metricTitle(m)]), metrics.includes(select.value) ? select.value : robustOf(metrics));
  const metric = select.value;
  const points = sweep.points.flatMap(({ at, runs }) => {
    const found = meanOf(runs.map((i) => accuracy(RUNS[i], metric, protocol)));
    return found ? [{ at, found }] : [];
  });
  const nothing = el("p", { className: "muted", textContent: "None of its runs was evaluated by this suite." });
  const make = sweep.keys.length === 1 ? sweepCurve : sweepMap;
  draw(byId("sweep-chart"), (width) => (points.length ? make(width, sweep, points, metricTitle(metric)) : [nothing]));
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
