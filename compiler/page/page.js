"use strict";
(() => {
  const root = document.documentElement;
  addEventListener("error", () => { root.dataset.error = "true"; });
  const data = JSON.parse(document.getElementById("data").textContent);
  const scroll = document.getElementById("gantt"), svg = scroll.querySelector("svg");
  const tip = document.getElementById("tip"), cursor = document.getElementById("cursor");
  const kinds = { F: "forward", B: "backward", W: "weight gradients" };
  let at = null;  // [lane, index] of the action that is pointed at

  function seconds(ns) {
    if (ns >= 1e9) return (ns / 1e9).toFixed(2) + " s";
    return ns >= 1e6 ? (ns / 1e6).toFixed(2) + " ms" : (ns / 1e3).toFixed(2) + " µs";
  }
  function bytes(n) {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let i = 0;
    while (n >= 1024 && i < 4) { n /= 1024; i += 1; }
    return n.toFixed(i < 1 ? 0 : i < 3 ? 1 : 2) + " " + units[i];
  }

  // the last action of a lane that starts before a moment
  function before(lane, ns) {
    const actions = data.lanes[lane];
    let low = -1, high = actions.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (actions[middle][3] <= ns) low = middle; else high = middle - 1;
    }
    return low;
  }

  function show(lane, index, x, y) {
    const [kind, stage, microbatch, start, end, held] = data.lanes[lane][index];
    at = [lane, index];
    tip.textContent = `${stage}${kind}${microbatch}: ${kinds[kind]} of microbatch ${microbatch}\n` +
      `stage ${stage} on rank ${lane}\n${seconds(end - start)}, from ${seconds(start)} to ${seconds(end)}` +
      (held ? `\nholds ${bytes(held)} then` : "");
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
    tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18) + "px";
    const [top, height] = data.tops[lane];
    cursor.setAttribute("x", 100 * start / data.span + "%");
    cursor.setAttribute("width", 100 * (end - start) / data.span + "%");
    cursor.setAttribute("y", top);
    cursor.setAttribute("height", height);
    cursor.removeAttribute("hidden");
  }
  function hide() { tip.hidden = true; cursor.setAttribute("hidden", ""); }

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), y = event.clientY - box.top;
    const lane = data.tops.findIndex(([top, height]) => y >= top && y <= top + height);
    const ns = data.span * (event.clientX - box.left) / box.width;
    const index = lane < 0 || !data.lanes[lane].length ? -1 : before(lane, ns);
    if (index < 0 || data.lanes[lane][index][4] < ns) hide();
    else show(lane, index, event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", hide);

  function select(lane, index) {
    const [, , , start, end] = data.lanes[lane][index];
    const wide = svg.getBoundingClientRect().width, middle = wide * (start + end) / 2 / data.span;
    if (middle < scroll.scrollLeft || middle > scroll.scrollLeft + scroll.clientWidth)
      scroll.scrollLeft = middle - scroll.clientWidth / 2;
    const box = svg.getBoundingClientRect(), [top, height] = data.tops[lane];
    show(lane, index, box.left + middle, box.top + top + height / 2);
  }
  scroll.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Escape") { hide(); return; }
    const move = steps[event.key];
    if (!move || !data.lanes.some((lane) => lane.length)) return;
    event.preventDefault();
    if (!at) { select(data.lanes.findIndex((lane) => lane.length), 0); return; }
    let [lane, index] = at;
    if (move[0]) {
      const next = lane + move[0];
      if (!data.lanes[next] || !data.lanes[next].length) return;
      index = Math.max(0, before(next, data.lanes[lane][index][3]));
      lane = next;
    } else index = Math.max(0, Math.min(data.lanes[lane].length - 1, index + move[1]));
    select(lane, index);
  });
  scroll.addEventListener("blur", hide);

  const buttons = [...document.querySelectorAll("[data-zoom]")];
  for (const button of buttons) button.addEventListener("click", () => {
    const middle = (scroll.scrollLeft + scroll.clientWidth / 2) / svg.getBoundingClientRect().width;
    svg.style.minWidth = `calc(${Number(button.dataset.zoom)} * max(100%, 860px))`;
    for (const each of buttons) each.setAttribute("aria-pressed", String(each === button));
    scroll.scrollLeft = middle * svg.getBoundingClientRect().width - scroll.clientWidth / 2;
    hide();
  });
  addEventListener("beforeprint", () => {
    for (const each of document.querySelectorAll("details")) each.open = true;
  });
  root.dataset.actions = data.lanes.reduce((sum, lane) => sum + lane.length, 0);
  root.dataset.ready = "true";
})();
