// SPDX-License-Identifier: Apache-2.0
// The page: shows what /api/stream sends, everything first and then every sample. Only this file touches the document.
import { bars } from "./lives.js";
import { chart } from "./charts.js";
import { colour } from "./colours.js";

const HISTORY = 600;
// The server sends something every 10 s at least.
const SILENT_MS = 15000, LOOK_MS = 3000;
// Values that are not sent, because they are these.
const NOTHING = { downtime_s: 0, added_stall_s: 0, rounds: 0, bytes: 0, lane: "", code: "", reason: "" };
const points = [];
const percent = (share) => `${(100 * share).toFixed(0)} %`;
const tokens = chart(document.getElementById("tokens"), (v) => v.toFixed(0));
const kv = chart(document.getElementById("kv"), percent, () => [0, 1]);

const element = (name, text = "", className = "") => {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
};

function meter(share) {
  const made = document.createElement("meter");
  Object.assign(made, { min: 0, max: 1, high: 0.9, low: 0.7, optimum: 0, value: share });
  return made;
}

function share(value) {
  const made = document.createElement("progress");
  Object.assign(made, { max: 1, value });
  return made;
}

function table(id, columns, rows, empty) {
  const head = element("tr");
  head.append(...columns.map((column) => element("th", column)));
  const body = rows.map((cells) => {
    const row = element("tr");
    for (const cell of cells) {
      const made = cell instanceof Element && cell.tagName === "TD" ? cell : element("td");
      if (cell instanceof Element && made !== cell) made.append(cell);
      if (!(cell instanceof Element)) made.textContent = cell;
      row.append(made);
    }
    return row;
  });
  if (!body.length) body.push(element("tr", empty, "empty"));
  document.getElementById(id).replaceChildren(head, ...body);
}

// A name in the colour that its worker has in the charts and bars.
function named(worker) {
  const made = element("td", worker, "worker");
  made.style.setProperty("--worker", colour(worker));
  return made;
}

function summary(point) {
  const pairs = {
    "tokens/s": point.tokens_per_s.toFixed(0), requests: point.requests, waiting: point.waiting, moving: point.moving,
  };
  document.getElementById("summary").replaceChildren(...Object.entries(pairs).map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", name), element("dd", String(value)));
    return pair;
  }));
}

function condition({ missing, cordoned, draining }) {
  const leaving = draining ? "draining" : cordoned ? "cordoned" : "";
  return element("td", [leaving, missing && `missing: ${missing}`].filter(Boolean).join(", "), missing ? "missing" : "draining");
}

function workers({ point, workers }) {
  const loads = new Map(point.workers.map((load) => [load.worker, load]));
  const sorted = [...workers].sort((a, b) => a.role.localeCompare(b.role) || a.worker.localeCompare(b.worker));
  table("workers", ["worker", "role", "KV use", "", "running", "waiting", "tokens/s", "step", "lanes", ""],
    sorted.map((worker) => {
      const load = loads.get(worker.worker);
      if (!load) return [named(worker.worker), worker.role || "?", ..."??????", "", condition(worker)];
      return [named(load.worker), load.role, meter(load.kv_use), percent(load.kv_use), load.running, load.waiting,
        load.tokens_per_s.toFixed(0), `${(1e3 * worker.stats.step_s).toFixed(1)} ms`,
        (worker.info?.lanes ?? []).join(", "), condition(worker)];
    }), "no workers");
}

function moves(all) {
  const last = all.slice(0, 12).map((move) => ({ ...NOTHING, ...move }));
  const most = Math.max(1, ...last.map((move) => move.bytes));
  const rounds = Math.max(1, ...last.map((move) => move.rounds));
  table("moves", ["request", "from", "to", "mode", "result", "downtime", "added stall", "rounds", "", "MB", "", "lane"],
    last.map((move) => [move.request_id.slice(0, 13), named(move.source), named(move.target), move.mode,
      element("td", move.ok ? "done" : "failed", move.ok ? "done" : "failed"),
      `${(1e3 * move.downtime_s).toFixed(1)} ms`, `${(1e3 * move.added_stall_s).toFixed(1)} ms`,
      move.rounds, share(move.rounds / rounds), (move.bytes / 1e6).toPrecision(3), share(move.bytes / most),
      element("td", [move.lane, move.code, move.reason].filter(Boolean).join(" "), "long")]), "none yet");
}

function decisions(all) {
  document.getElementById("planner").hidden = !all.length;
  const moved = all.filter((d) => d.verdict !== "leave").slice(-8).reverse();
  const left = all.filter((d) => d.verdict === "leave").slice(0, 8);
  table("decisions", ["policy", "decision", "request", "from", "to", "why"],
    [...moved, ...left].map((d) => [d.policy, d.verdict, (d.request_id ?? "").slice(0, 13), d.source ?? "", d.target ?? "", element("td", d.reason, "long")]),
    "");
}

function charts() {
  const at = points.map((point) => point.at);
  const known = new Map(points.flatMap((point) => point.workers.map((load) => [load.worker, load])));
  const loads = [...known.values()].sort((a, b) => a.role.localeCompare(b.role) || a.worker.localeCompare(b.worker));
  const of = (worker, key) => points.map((point) => point.workers.find((load) => load.worker === worker)?.[key] ?? null);
  tokens(at, loads, loads.map(({ worker }) => of(worker, "tokens_per_s")));
  kv(at, loads, loads.map(({ worker }) => of(worker, "kv_use")));
}

function say(error) {
  const line = document.getElementById("error");
  line.hidden = !error;
  line.textContent = error;
}

function show({ error, latest, history }) {
  say(error || (latest ? "" : "no worker has answered yet"));
  if (history) points.splice(0, points.length, ...history);
  if (!latest) return;
  if (!points.length || points.at(-1).at !== latest.point.at) points.push(latest.point);
  points.splice(0, points.length - HISTORY);
  summary(latest.point);
  workers(latest);
  moves(latest.moves);
  decisions(latest.decisions);
  bars(document.getElementById("timeline"), latest.lives, latest.point.at);
  charts();
  document.body.dataset.samples = points.length;
}

let stream, asked, heard;

function listen() {
  stream?.close();
  stream = new EventSource("/api/stream");
  asked = Date.now();
  stream.onmessage = (event) => {
    asked = heard = Date.now();
    document.body.classList.remove("lost");
    show(JSON.parse(event.data));
  };
  stream.onerror = lost;
}

function lost() {
  const since = heard ? `; this is how it was at ${new Date(heard).toTimeString().slice(0, 8)}` : "";
  // A browser that was refused does not try again by itself.
  const refused = stream.readyState === EventSource.CLOSED;
  document.body.classList.add("lost");
  say(`${refused ? "the server refuses: open the address that dynamo serve printed" : "connection lost, trying again"}${since}`);
}

// A phone that slept, or a network that swallows everything, brings no error.
function look() {
  if (stream.readyState !== EventSource.CLOSED && Date.now() - asked < SILENT_MS) return;
  lost();
  listen();
}

listen();
setInterval(look, LOOK_MS);
addEventListener("online", look);
document.addEventListener("visibilitychange", look);
