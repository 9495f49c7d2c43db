// SPDX-License-Identifier: Apache-2.0
// The same worker has the same colour everywhere; colours are given in the order of appearance.
const COLOURS = ["#3b7dd8", "#e08a1e", "#2a9d6f", "#a05195", "#6b7f2a", "#d45087", "#0d9aa8", "#8c6d46"];
const given = new Map();

export function colour(worker) {
  if (!given.has(worker)) given.set(worker, COLOURS[given.size % COLOURS.length]);
  return given.get(worker);
}
