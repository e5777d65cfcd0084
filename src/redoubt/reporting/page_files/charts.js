// Scatter, lines, heat map: each gives the nodes that `draw` puts into its box.

/** What a chart's numbers are of. */
const caption = (text) => el("p", { className: "muted small", textContent: text });

/** A legend entry for each name; `symbol(i)` draws within 26 x 12 pixels. */
function legend(names, symbol) {
  const entry = (name, i) => el("span", {}, svg("svg", { viewBox: "0 0 26 12", "aria-hidden": "true" }, symbol(i)), name);
  return el("div", { className: "legend" }, ...names.map(entry));
}

/** Points {x, y, dx, dy, colour, shape, text, open}; dx and dy are standard deviations, in %. */
function scatter(width, points, { xLabel, yLabel, title, colours, shapes }) {
  const height = Math.min(420, Math.max(280, width * 0.6)), area = [44, 24, width - 12, height - 42];
  const ends = (of, sd) => points.flatMap((p) => [p[of] - p[sd], p[of] + p[sd]]);
  const x = scaleOf(ends("x", "dx"), area[0] + 10, area[2] - 10, { pad: 0.05, about: width / 70 });
  const y = scaleOf(ends("y", "dy"), area[3] - 10, area[1] + 10, { pad: 0.05, about: 6 });
  const root = frame({ width, height, area, x, y, xLabel, yLabel, name: `${yLabel} over ${xLabel}` });
  const places = points.map((p) => ({ ...p, x: x(p.x), y: y(p.y) }));
  points.forEach((p, i) => {
    const stroke = colour(p.colour), at = places[i];
    if (p.dx) root.append(svg("line", { stroke, x1: x(p.x - p.dx), x2: x(p.x + p.dx), y1: at.y, y2: at.y }));
    if (p.dy) root.append(svg("line", { stroke, x1: at.x, x2: at.x, y1: y(p.y - p.dy), y2: y(p.y + p.dy) }));
    root.append(marker(at.x, at.y, p.shape, { fill: stroke, "fill-opacity": 0.85, stroke: "var(--card)" }));
  });
  const dot = (i) => marker(13, 6, 0, { fill: colour(i) });
  const shape = (i) => marker(13, 6, i, { fill: "none", stroke: "var(--muted)", "stroke-width": 1.5 });
  return [caption(title), legend(colours, dot), legend(shapes, shape), explore(root, places)];
}

/** Series of points [x, y, sd?] by name; `percent`: y is an accuracy in [0, 1]. */
function lines(width, series, { xLabel, yLabel, percent: share, log, mark, full = true }) {
  const height = 260, area = [48, 24, width - 12, height - 42], names = Object.keys(series);
  const factor = share ? 100 : 1, all = names.flatMap((n) => series[n]);
  const tops = all.flatMap(([, v, sd = 0]) => [factor * (v - sd), factor * (v + sd)]);
  const xs = mark == null || log ? all.map((p) => p[0]) : [...all.map((p) => p[0]), mark];
  const x = scaleOf(xs, area[0] + 6, area[2] - 6, { log, about: width / 80 });
  const y = scaleOf(tops, area[3], area[1], share && full ? { range: [0, 100] } : { pad: 0.05 });
  const root = frame({ width, height, area, x, y, xLabel, yLabel: share ? `${yLabel} in %` : yLabel, name: `${yLabel} over ${xLabel}` });
  if (mark != null) root.append(svg("line", { class: "mark", x1: x(mark), x2: x(mark), y1: area[1], y2: area[3] }));
  const places = [];
  names.forEach((name, i) => {
    const stroke = colour(i), points = series[name].map(([a, b, sd]) => [x(a), y(factor * b), sd && factor * sd, a, b]);
    root.append(svg("polyline", { class: "line", stroke, "stroke-dasharray": dash(i), points: points.map((p) => `${p[0].toFixed(1)},${p[1].toFixed(1)}`).join(" ") }));
    for (const [px, py, sd, a, b] of points) {
      if (sd) root.append(svg("line", { stroke, x1: px, x2: px, y1: y(factor * b - sd), y2: y(factor * b + sd) }));
      if (points.length <= 25) root.append(svg("circle", { cx: px, cy: py, r: 3, fill: stroke }));
      const value = share ? `${percent(b)} %` : short(b);
      places.push({ x: px, y: py, text: `${name}: ${value}${sd ? ` ± ${short(sd)}` : ""}\n${xLabel} ${short(a)}` });
    }
  });
  const symbol = (i) => svg("line", { x1: 0, x2: 26, y1: 6, y2: 6, stroke: colour(i), "stroke-width": 2.5, "stroke-dasharray": dash(i) });
  return [names.length > 1 ? legend(names, symbol) : "", explore(root, places)];
}

const CIVIDIS = [[0, 34, 78], [66, 78, 108], [125, 124, 120], [188, 174, 108], [254, 232, 56]];
/** The colour of a share in [0, 1] and, of black and white, what can be read on it. */
function shade(t) {
  const at = Math.min(Math.max(t, 0), 1) * (CIVIDIS.length - 1), i = Math.min(Math.floor(at), CIVIDIS.length - 2);
  const rgb = CIVIDIS[i].map((v, k) => Math.round(v + (at - i) * (CIVIDIS[i + 1][k] - v)));
  return [`rgb(${rgb.join(" ")})`, 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] > 120 ? "#000" : "#fff"];
}

/** Rows from top to bottom, columns from left to right, values [row][column] as {value, text} or null. */
function heatMap(width, { rows, columns, values, xLabel, yLabel, show, range }) {
  const there = values.flat().filter(Boolean).map((c) => c.value);
  const [low, high] = range ?? [Math.min(...there), Math.max(...there)];
  const left = Math.min(Math.max(...rows.map((r) => r.length)) * 6.6 + 14, width * 0.45);
  const w = (width - left - 4) / columns.length, h = rows.length > 8 ? 17 : 34, top = 22, bottom = top + rows.length * h;
  const root = svg("svg", { viewBox: `0 0 ${width} ${bottom + 40}`, height: bottom + 40, tabindex: 0, role: "group", "aria-label": `${yLabel} by ${xLabel}` });
  root.append(label(yLabel, 0, 11, "start"), label(xLabel, (left + width) / 2, bottom + 36));
  const every = Math.ceil((Math.max(...columns.map((c) => c.length)) * 7 + 6) / w), places = [];
  columns.forEach((c, k) => k % every || root.append(label(c, left + (k + 0.5) * w, bottom + 17)));
  rows.forEach((r, j) => {
    const most = Math.floor((left - 12) / 6.4), text = r.length > most ? `…${r.slice(1 - most)}` : r;
    root.append(label(text, left - 7, top + (j + 0.5) * h + 4, "end"));
    columns.forEach((c, k) => {
      const cell = values[j][k], x = left + k * w, y = top + j * h;
      if (!cell) return;
      const [fill, ink] = shade(high > low ? (cell.value - low) / (high - low) : 0.5);
      root.append(svg("rect", { x, y, width: w + 0.3, height: h + 0.3, fill }));
      if (w > 44 && h > 20) root.append(svg("text", { x: x + w / 2, y: y + h / 2 + 4, "text-anchor": "middle", class: ink === "#000" ? "dark" : "light" }, show(cell.value)));
      places.push({ x: x + w / 2, y: y + h / 2, text: `${cell.text}\n${yLabel} ${r}\n${xLabel} ${c}` });
    });
  });
  const bar = el("div", { className: "legend" }, el("span", {}, show(low)), el("span", { className: "bar" }), el("span", {}, show(high)));
  return [bar, explore(root, places, { reach: Math.max(w, h) })];
}
