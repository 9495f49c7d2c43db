// SPDX-License-Identifier: Apache-2.0
// The life of each request across workers, as one bar of parts: see components/dashboard/lives.py.
import { colour } from "./colours.js";

const SVG = "http://www.w3.org/2000/svg";
const ROW = 22, LEFT = 120, ROWS = 20, WINDOW_S = 60;

function node(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

export function bars(parent, lives, now) {
  const recent = lives.filter((life) => !life.over || life.parts.some((part) => part.ended > now - WINDOW_S)).slice(0, ROWS);
  const width = Math.max(300, parent.clientWidth), height = (recent.length + 1) * ROW;
  const first = Math.max(now - WINDOW_S, Math.min(now - 5, ...recent.map((life) => life.parts[0].began)));
  const x = (at) => LEFT + Math.max(0, (at - first) / (now - first)) * (width - LEFT - 8);
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, height });
  const step = now - first > 30 ? 10 : now - first > 10 ? 5 : 1;
  for (let ago = 0; now - ago >= first; ago += step) {
    const at = x(now - ago), label = ago ? `${ago} s ago` : "now";
    svg.append(node("line", { class: "grid", x1: at, x2: at, y1: 0, y2: height - ROW }));
    svg.append(node("text", { class: "axis", x: at, y: height - 6, "text-anchor": ago ? "middle" : "end" }, label));
  }
  recent.forEach((life, row) => {
    const y = row * ROW + 3;
    svg.append(node("text", { x: 0, y: y + 11 }, life.request_id.slice(0, 13)));
    for (const part of life.parts) {
      if (part.kind === "replayed") {
        svg.append(node("line", { class: "replayed", x1: x(part.began), x2: x(part.began), y1: y, y2: y + 16 }));
        continue;
      }
      const thin = part.kind === "copying" || part.kind === "frozen";
      const bar = node("rect", {
        class: part.kind, x: x(part.began), width: Math.max(1.5, x(part.ended) - x(part.began)),
        y: thin ? y + 10 : y, height: thin ? 5 : 14, ...(thin ? {} : { fill: colour(part.worker) }),
      });
      bar.append(node("title", {}, `${part.kind} ${part.worker}: ${(1e3 * (part.ended - part.began)).toFixed(0)} ms`));
      svg.append(bar);
    }
  });
  parent.replaceChildren(svg);
}
