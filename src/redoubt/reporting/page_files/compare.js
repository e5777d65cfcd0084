// Two runs: where their configs differ, and McNemar's test on the same examples.

async function showComparison() {
  const [a, b] = ["first", "second"].map((id) => RUNS.find((r) => r.name === byId(id).value));
  const box = byId("comparison");
  if (!a || !b || a === b) return box.replaceChildren(el("p", { className: "muted", textContent: "Choose two different runs." }));
  const parts = [...(await tests(a, b)), ...(await configDifferences(a, b))];
  box.replaceChildren(...parts);
}

const decides = (key) => !DATA.excluded.some((e) => key === e || key.startsWith(`${e}.`));

async function configDifferences(a, b) {
  const [left, right] = [(await detailsOf(a)).config, (await detailsOf(b)).config];
  const keys = [...new Set([...Object.keys(left), ...Object.keys(right)])].filter((k) => left[k] !== right[k]).sort();
  const code = (text) => (text == null ? null : el("code", { textContent: text }));
  const rows = keys.sort((p, q) => decides(q) - decides(p)).map((k) => [code(k), code(left[k]), code(right[k]), decides(k) ? "yes" : "no"]);
  return [el("h3", { textContent: `Config: ${keys.length} keys differ` }), tableOf(["key", "A", "B", "decides the weights"], rows, [], "wrap")];
}

/** Pairs of evaluations under one protocol and on the same test images, a pair for each protocol. */
function pairs(a, b) {
  return DATA.protocols.flatMap((_, p) => {
    const seconds = evaluationsOf(b, p);
    const found = evaluationsOf(a, p).flatMap((x) => seconds.filter((y) => x.verdicts && y.verdicts && x.verdicts.of === y.verdicts.of).map((y) => [x, y]));
    return found.slice(0, 1);
  });
}

async function tests(a, b) {
  const title = el("h3", { textContent: "McNemar's exact test on the same examples" }), found = pairs(a, b);
  if (!found.length) {
    const without = [a, b].some((r) => r.evaluations.some((e) => !e.verdicts));
    const why = without ? "The verdicts of one of them are not on this page." : "They share no evaluation: same suite and settings, same test images.";
    return [title, el("p", { className: "muted", textContent: why })];
  }
  const note = "p is two-sided and not corrected for the number of attacks.";
  return [title, ...(await Promise.all(found.map(testsOf))).flat(), el("p", { className: "muted small", textContent: note })];
}

async function testsOf([x, y]) {
  const [left, right] = [await verdictsOf(x), await verdictsOf(y)];
  const rows = x.verdicts.names.filter((name) => name in right).map((name) => {
    const { both, onlyFirst, onlySecond, neither } = twoByTwo(left[name], right[name]);
    const difference = (onlyFirst - onlySecond) / x.n, p = mcnemar(onlyFirst, onlySecond);
    return [metricTitle(name), ...[both, onlyFirst, onlySecond, neither].map(String), (difference > 0 ? "+" : "") + percent(difference),
      el("b", {}, p < 1e-4 ? p.toExponential(1) : p.toFixed(4))];
  });
  return [el("h4", { textContent: `${DATA.protocols[x.protocol]}, ${x.n} images` }),
    tableOf(["attack", "both right", "only A", "only B", "neither", "A − B in points", "p"], rows, [1, 2, 3, 4, 5, 6])];
}
