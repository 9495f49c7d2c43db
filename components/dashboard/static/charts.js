// SPDX-License-Identifier: Apache-2.0
// One line chart that grows: returns a function that draws (times, names, series).
import uPlot from "./vendor/uPlot.esm.js";
import { colour } from "./colours.js";

const HEIGHT = 180;

export function chart(parent, format, range) {
  let plot = null;
  let drawn = "";
  const make = (names) => new uPlot({
    width: parent.clientWidth, height: HEIGHT,
    cursor: { drag: { x: false, y: false } },
    scales: { y: range ? { range } : { range: (_, low, high) => [0, Math.max(1, high)] } },
    axes: [{ stroke: "#808a86" }, { stroke: "#808a86", size: 56, values: (_, ticks) => ticks.map(format) }],
    series: [{}, ...names.map((name) => ({ label: name, stroke: colour(name), width: 1.5, value: (_, v) => v == null ? "" : format(v) }))],
  }, [[], ...names.map(() => [])], parent);
  addEventListener("resize", () => plot?.setSize({ width: parent.clientWidth, height: HEIGHT }));
  return (times, names, series) => {
    if (names.join() !== drawn) {
      plot?.destroy();
      plot = make(names);
      drawn = names.join();
    }
    plot.setData([times, ...series]);
  };
}
