// SPDX-License-Identifier: Apache-2.0
// One line chart that grows: returns a function that draws (times, workers, series). The legend shows the newest values, or
// those under the pointer.
import uPlot from "./vendor/uPlot.esm.js";
import { colour } from "./colours.js";

const HEIGHT = 180, SHORTEST_S = 60;
const ink = () => getComputedStyle(document.body).getPropertyValue("--dim");
const line = () => getComputedStyle(document.body).getPropertyValue("--line");
const clock = (seconds) => new Date(1e3 * seconds).toTimeString().slice(0, 8);
// A value of the legend: that under the pointer, which gives no index while it is elsewhere.
const shown = (format) => (plot, _, series, index) => {
  const value = plot.data[series].at(index ?? -1);
  return value == null ? "" : format(value);
};

export function chart(parent, format, range) {
  let plot = null;
  let drawn = "";
  const grid = { stroke: line, width: 1 };
  const make = (workers) => new uPlot({
    width: parent.clientWidth, height: HEIGHT,
    cursor: { drag: { x: false, y: false }, points: { size: 5 } },
    scales: {
      x: { range: (_, first, last) => [Math.min(first, last - SHORTEST_S), last] },
      y: { range: range ?? ((_, low, high) => [0, Math.max(10, 1.1 * high)]) },
    },
    axes: [
      { stroke: ink, grid, ticks: grid, space: 90, values: (_, ticks) => ticks.map(clock) },
      { stroke: ink, grid, ticks: grid, size: 52, values: (_, ticks) => ticks.map(format) },
    ],
    series: [{ label: "at", value: shown(clock) }, ...workers.map(({ worker, role }) => ({
      label: `${worker} ${role}`, stroke: colour(worker), width: 2, points: { show: false }, value: shown(format),
    }))],
  }, [[], ...workers.map(() => [])], parent);
  addEventListener("resize", () => plot?.setSize({ width: parent.clientWidth, height: HEIGHT }));
  return (times, workers, series) => {
    const names = workers.map(({ worker }) => worker).join();
    if (names !== drawn) {
      plot?.destroy();
      plot = make(workers);
      drawn = names;
    }
    plot.setData([times, ...series]);
    plot.setLegend();
  };
}
