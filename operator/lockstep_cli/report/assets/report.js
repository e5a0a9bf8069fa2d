// One cursor over all charts: they share the time axis, so the nearest step is looked up once and shown everywhere.
(() => {
  const { span, steps } = JSON.parse(document.getElementById("data").textContent);
  const readout = document.getElementById("readout");
  const holder = document.querySelector(".charts");
  const panels = [...document.querySelectorAll("svg.panel")];
  if (!steps.length) return;

  const nearest = (time) => {
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle][0] < time) low = middle + 1; else high = middle;
    }
    return low && time - steps[low - 1][0] < steps[low][0] - time ? steps[low - 1] : steps[low];
  };

  const move = (event) => {
    const panel = event.currentTarget, box = panel.getBoundingClientRect();
    const left = +panel.dataset.left, right = +panel.dataset.right;
    const x = (event.clientX - box.left) / box.width * panel.viewBox.baseVal.width;
    if (x < left || x > right) return leave();
    const [at, step, loss, seconds, again, clock] = nearest((x - left) / (right - left) * span);
    const snapped = left + at / span * (right - left);
    for (const each of panels) {
      const cursor = each.querySelector(".cursor");
      cursor.setAttribute("x1", snapped);
      cursor.setAttribute("x2", snapped);
      cursor.style.visibility = "visible";
    }
    readout.textContent = `${clock}   step ${step}${again ? " (done again)" : ""}   loss ${loss.toFixed(3)}   ${(seconds * 1000).toFixed(0)} ms`;
    readout.hidden = false;
    const within = holder.getBoundingClientRect();
    const place = event.clientX - within.left + 14;
    readout.style.left = `${Math.max(4, place + readout.offsetWidth > within.width ? place - readout.offsetWidth - 28 : place)}px`;
    readout.style.top = `${event.clientY - within.top - 34}px`;
  };
  const leave = () => {
    readout.hidden = true;
    for (const each of panels) each.querySelector(".cursor").style.visibility = "hidden";
  };
  for (const panel of panels) {
    panel.addEventListener("mousemove", move);
    panel.addEventListener("mouseleave", leave);
  }
})();
