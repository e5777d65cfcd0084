// Means over seeds, and McNemar's test on the same examples.

/** Mean, sample standard deviation (null of one value) and number of the values that are there; null of none. */
function meanOf(values) {
  const there = values.filter((v) => v != null), n = there.length;
  if (!n) return null;
  const mean = there.reduce((a, b) => a + b) / n;
  const sd = n > 1 ? Math.sqrt(there.reduce((a, v) => a + (v - mean) ** 2, 0) / (n - 1)) : null;
  return { mean, sd, n };
}

/** `75.10 ± 0.42 (3)`. */
function meanText(found, show = percent) {
  if (!found) return MISSING;
  return found.sd == null ? `${show(found.mean)} (1)` : `${show(found.mean)} ± ${show(found.sd)} (${found.n})`;
}

/**
 * Two-sided p of McNemar's exact test: b and c examples that only one of two models got right are heads and tails of a
 * fair coin. The sum of the binomial's tail in logarithms, as 2^-10000 is no number.
 */
function mcnemar(b, c) {
  const n = b + c, logs = [-n * Math.LN2];
  for (let i = 0; i < Math.min(b, c); i++) logs.push(logs[i] + Math.log((n - i) / (i + 1)));
  const top = logs.at(-1);
  return Math.min(1, 2 * Math.exp(top) * logs.reduce((sum, log) => sum + Math.exp(log - top), 0));
}

/** An evaluation's verdicts by attack, one byte of 0 or 1 per example; each row is stored as what the last one is not. */
async function verdictsOf(evaluation) {
  const { names, bits } = evaluation.verdicts, bytes = await inflated(bits), width = Math.ceil(evaluation.n / 8);
  for (let i = width; i < bytes.length; i++) bytes[i] ^= bytes[i - width];
  const bit = (row, i) => (bytes[row * width + (i >> 3)] >> (7 - (i & 7))) & 1;
  return Object.fromEntries(names.map((name, row) => [name, Uint8Array.from({ length: evaluation.n }, (_, i) => bit(row, i))]));
}

/** Examples that both, only the first, only the second, and neither got right. */
function twoByTwo(first, second) {
  const counts = [0, 0, 0, 0];
  first.forEach((right, i) => counts[3 - 2 * right - second[i]]++);
  return { both: counts[0], onlyFirst: counts[1], onlySecond: counts[2], neither: counts[3] };
}
