"use strict";
// What the page was made from, and how numbers are shown. Nothing of it is ever taken for HTML.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const AXES = ["defense", "base", "model", "data", "seed"];
const MISSING = "–";

const percent = (value) => (value == null ? MISSING : (100 * value).toFixed(2));
const short = (value) => (value == null ? MISSING : String(Number(value.toPrecision(4))));
const metricTitle = (name) => DATA.metrics[name] ?? name;

function clock(seconds) {
  if (seconds == null) return MISSING;
  const s = Math.round(seconds), two = (v) => String(v).padStart(2, "0");
  return `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)}:${two(s % 60)}`;
}

/** A run's evaluations under a protocol, that on most images first; under "any" all of them, that which stands for it first. */
function evaluationsOf(run, protocol) {
  if (protocol === "any") return [...run.evaluations].sort((a, b) => (b === standingOf(run)) - (a === standingOf(run)));
  return run.evaluations.filter((e) => e.protocol === Number(protocol)).sort((a, b) => b.n - a.n);
}

const standingOf = (run) => run.evaluations[run.standing];

/** What the numbers under a protocol are of. */
const labelOf = (protocol) => (protocol === "any" ? "of each run the evaluation that stands for it" : DATA.protocols[protocol]);

/** The evaluation that gives a run its number for a metric. */
const evaluationWith = (run, metric, protocol) => evaluationsOf(run, protocol).find((e) => metric in e.metrics);

/** The accuracy in [0, 1]; undefined where there is none. */
const accuracy = (run, metric, protocol) => evaluationWith(run, metric, protocol)?.metrics[metric][0];

/** The metrics that some run has under a protocol, in the order of the columns. */
function metricsUnder(protocol, runs = RUNS) {
  const found = new Set(runs.flatMap((r) => evaluationsOf(r, protocol).flatMap((e) => Object.keys(e.metrics))));
  return Object.keys(DATA.metrics).filter((name) => found.has(name));
}

/** The metric that stands for robustness: the first of the usual ones, else the last. */
function robustOf(metrics) {
  const attacked = metrics.filter((name) => name !== "natural");
  return DATA.robust.find((name) => attacked.includes(name)) ?? attacked.at(-1);
}

/** Bytes of a base64 text that zlib compressed. */
async function inflated(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

let opened;
/** Config, curves and audits of a run. */
async function detailsOf(run) {
  opened ??= inflated(DATA.details).then((bytes) => JSON.parse(new TextDecoder().decode(bytes)));
  return (await opened)[RUNS.indexOf(run)];
}
