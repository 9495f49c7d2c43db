// SPDX-License-Identifier: Apache-2.0
// The life of each request across workers, as one bar of parts: see EventKind in components/messages.py.
import { colour } from "./colours.js";

const SVG = "http://www.w3.org/2000/svg";
const ROW = 22, LEFT = 120, ROWS = 20, WINDOW_S = 60;

// Parts {kind, worker, from, to} of one request; what is not over ends now.
export function parts(events, now) {
  const found = [];
  let owner = null, copying = null, frozen = null;
  const close = (part, at) => part && found.push({ ...part, to: at });
  for (const { at, kind, worker } of events) {
    if (kind === "copying") copying = { kind, worker, from: at };
    else if (kind === "frozen") frozen = { kind, worker, from: at };
    else if (kind !== "arrived") {
      close(owner, at); close(copying, at); close(frozen, at);
      copying = frozen = null;
      owner = kind === "ended" ? null : { kind: kind === "prefill" ? "prefill" : "decode", worker, from: at, replayed: kind === "replayed" };
    }
  }
  close(owner, now); close(copying, now); close(frozen, now);
  return found;
}

function node(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

export function bars(parent, streams, now) {
  const recent = streams.filter((s) => s.events.length && s.events.at(-1).at > now - WINDOW_S || !ended(s))
    .sort((a, b) => b.events[0].at - a.events[0].at).slice(0, ROWS);
  const width = Math.max(400, parent.clientWidth), height = (recent.length + 1) * ROW;
  const first = Math.max(now - WINDOW_S, Math.min(now - 5, ...recent.map((s) => s.events[0].at)));
  const x = (at) => LEFT + Math.max(0, (at - first) / (now - first)) * (width - LEFT - 8);
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, height });
  const step = now - first > 30 ? 10 : now - first > 10 ? 5 : 1;
  for (let ago = 0; now - ago >= first; ago += step) {
    const at = x(now - ago), label = ago ? `${ago} s ago` : "now";
    svg.append(node("line", { class: "grid", x1: at, x2: at, y1: 0, y2: height - ROW }));
    svg.append(node("text", { class: "axis", x: at, y: height - 6, "text-anchor": ago ? "middle" : "end" }, label));
  }
  recent.forEach((stream, row) => {
    const y = row * ROW + 3;
    svg.append(node("text", { x: 0, y: y + 11 }, stream.request_id.slice(0, 13)));
    for (const part of parts(stream.events, now)) {
      const thin = part.kind === "copying" || part.kind === "frozen";
      const bar = node("rect", {
        class: part.kind, x: x(part.from), width: Math.max(1.5, x(part.to) - x(part.from)),
        y: thin ? y + 10 : y, height: thin ? 5 : 14, ...(thin ? {} : { fill: colour(part.worker) }),
      });
      bar.append(node("title", {}, `${part.kind} ${part.worker}: ${(1e3 * (part.to - part.from)).toFixed(0)} ms`));
      svg.append(bar);
      if (part.replayed) svg.append(node("line", { class: "replayed", x1: x(part.from), x2: x(part.from), y1: y, y2: y + 16 }));
    }
  });
  parent.replaceChildren(svg);
}

const ended = (stream) => stream.events.at(-1)?.kind === "ended";
