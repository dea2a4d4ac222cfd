"use strict";
(() => {
  const REACH = 60; // pixels from the pointer within which a point is shown
  const tip = document.getElementById("tip");
  let near = null;

  const hide = () => {
    if (near) near.classList.remove("near");
    near = null;
    tip.hidden = true;
  };

  const middle = (mark) => {
    const box = mark.getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  };

  const show = (mark) => {
    hide();
    near = mark;
    mark.classList.add("near");
    tip.textContent = mark.dataset.text;
    tip.hidden = false;
    const [x, y] = middle(mark);
    const beside = x + 12 + tip.offsetWidth > innerWidth ? x - 12 - tip.offsetWidth : x + 12;
    const above = y - 12 - tip.offsetHeight;
    tip.style.left = `${Math.max(4, beside)}px`;
    tip.style.top = `${above < 4 ? y + 12 : above}px`;
  };

  const nearest = (marks, x, y) => {
    let best = null;
    let least = REACH;
    for (const mark of marks) {
      const [left, top] = middle(mark);
      const distance = Math.hypot(left - x, top - y);
      if (distance < least) [best, least] = [mark, distance];
    }
    return best;
  };

  for (const plot of document.querySelectorAll(".plot")) {
    const marks = [...plot.querySelectorAll(".mark")];
    for (const mark of marks) {
      const title = mark.querySelector("title");
      mark.dataset.text = title.textContent;
      title.remove(); // the browser would show it too
    }
    const follow = (event) => {
      const mark = nearest(marks, event.clientX, event.clientY);
      if (mark) show(mark);
      else hide();
    };
    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || !marks.length) return;
      event.preventDefault();
      show(marks[(marks.indexOf(near) + step + marks.length) % marks.length]);
    });
  }
  addEventListener("scroll", hide, { passive: true });
})();
