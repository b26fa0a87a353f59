(function () {
  "use strict";
  var root = document.documentElement;
  var NS = "http://www.w3.org/2000/svg";
  function all(selector, base) { return Array.prototype.slice.call((base || document).querySelectorAll(selector)); }

  // Light or dark: the system's choice until the reader makes one.
  var button = document.getElementById("theme");
  function dark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }
  function say() { button.setAttribute("aria-pressed", String(dark())); }
  try { if (localStorage.getItem("moekit-theme")) root.dataset.theme = localStorage.getItem("moekit-theme"); } catch (e) {}
  button.hidden = false;
  button.addEventListener("click", function () {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("moekit-theme", root.dataset.theme); } catch (e) {}
    say();
  });
  say();

  // One tooltip for all charts.
  var tip = document.createElement("div");
  tip.id = "tip";
  document.body.appendChild(tip);
  function show(text, x, y) {
    tip.textContent = text;
    tip.style.display = "block";
    var box = tip.getBoundingClientRect();
    tip.style.left = Math.max(6, Math.min(x + 14, innerWidth - box.width - 6)) + "px";
    tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18) + "px";
  }
  function hide() { tip.style.display = "none"; }
  addEventListener("scroll", hide, { passive: true });
  addEventListener("keydown", function (e) { if (e.key === "Escape") hide(); });

  all("g.point").forEach(function (point) {
    var title = point.querySelector("title"), text = title.textContent;
    point.setAttribute("aria-label", text);
    title.remove();
    point.addEventListener("pointermove", function (e) { show(text, e.clientX, e.clientY); });
    point.addEventListener("pointerleave", hide);
    point.addEventListener("focus", function () {
      var box = point.getBoundingClientRect();
      show(text, box.x + box.width / 2, box.y + box.height / 2);
    });
    point.addEventListener("blur", hide);
  });

  function format(value, unit) {
    if (unit === "%") return (100 * value).toFixed(1) + "\u00a0%";
    return String(Number(value.toPrecision(4))) + (unit ? "\u00a0" + unit : "");
  }
  function data(figure) { return JSON.parse(figure.querySelector("script[type='application/json']").textContent); }
  function within(svg, event) {
    var point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return point;
  }

  // Sections with the same layers move together.
  var pickers = [];
  function picker(figure, count, names, draw) {
    var input = figure.querySelector("input[type=range]"), label = figure.querySelector(".which");
    var own = { key: names.join("\n"), set: set };
    function set(i) {
      input.value = i;
      input.setAttribute("aria-valuetext", names[i]);
      label.textContent = names[i];
      draw(i);
    }
    function choose(i) {
      i = Math.max(0, Math.min(count - 1, i));
      pickers.forEach(function (p) { if (p.key === own.key) p.set(i); });
    }
    pickers.push(own);
    input.setAttribute("aria-valuetext", names[0]);
    figure.querySelector(".pick").hidden = count < 2;
    input.addEventListener("input", function () { choose(Number(input.value)); });
    var steps = all(".pick button", figure);
    steps[0].addEventListener("click", function () { choose(Number(input.value) - 1); });
    steps[1].addEventListener("click", function () { choose(Number(input.value) + 1); });
  }

  all(".barchart").forEach(function (figure) {
    var d = data(figure), svg = figure.querySelector(".bars > svg"), now = 0;
    var left = Number(svg.dataset.left), right = Number(svg.dataset.right);
    var height = svg.viewBox.baseVal.height, slot = (right - left) / d.categories.length;
    var cursor = document.createElementNS(NS, "rect");
    cursor.setAttribute("class", "cursor hidden");
    cursor.setAttribute("y", 24); cursor.setAttribute("height", height - 72); cursor.setAttribute("width", slot);
    svg.appendChild(cursor);
    picker(figure, d.groups.length, d.groups.map(function (g) { return g.name; }), function (i) {
      now = i;
      all("[data-group]", svg).forEach(function (g) { g.classList.toggle("hidden", Number(g.dataset.group) !== i); });
      figure.querySelector("figcaption").textContent = d.groups[i].caption;
    });
    svg.addEventListener("pointermove", function (e) {
      var i = Math.floor((within(svg, e).x - left) / slot);
      if (i < 0 || i >= d.categories.length) { cursor.classList.add("hidden"); hide(); return; }
      cursor.classList.remove("hidden");
      cursor.setAttribute("x", left + i * slot);
      var lines = d.groups[now].series.map(function (s) { return s.name + ": " + format(s.values[i], d.unit); });
      show(d.x + " " + d.categories[i] + "\n" + lines.join("\n"), e.clientX, e.clientY);
    });
    svg.addEventListener("pointerleave", function () { cursor.classList.add("hidden"); hide(); });
  });

  var ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", STEPS = 4095, LEVELS = 16;
  function step(cells, at) { return ALPHABET.indexOf(cells[2 * at]) * 64 + ALPHABET.indexOf(cells[2 * at + 1]); }
  function level(s) { return Math.min(LEVELS - 1, Math.floor(Math.sqrt(s / STEPS) * LEVELS)); }
  function paths(layer) {
    var ways = new Array(LEVELS).fill("");
    for (var r = 0; r < layer.size; r++) {
      var begin = 0, current = -1;
      for (var c = 0; c <= layer.size; c++) {
        var here = c === layer.size ? -1 : level(step(layer.cells, r * layer.size + c));
        if (here !== current) {
          if (current > 0) ways[current] += "M" + begin + " " + r + "h" + (c - begin) + "v1h" + (begin - c) + "z";
          begin = c; current = here;
        }
      }
    }
    return ways;
  }
  all(".heatmaps").forEach(function (figure) {
    var d = data(figure), now = 0, svgs = all(".heat > figure > svg", figure);
    var picked = svgs.map(function (svg) {
      var mark = document.createElementNS(NS, "rect");
      mark.setAttribute("class", "picked hidden"); mark.setAttribute("width", 1); mark.setAttribute("height", 1);
      svg.appendChild(mark);
      return mark;
    });
    function draw(i) {
      now = i;
      d.panels.forEach(function (panel, p) {
        var layer = panel.layers[i], svg = svgs[p], group = svg.querySelector(".cells");
        svg.setAttribute("viewBox", "0 0 " + layer.size + " " + layer.size);
        svg.setAttribute("aria-label", panel.name + ", " + d.layers[i] + ". " + layer.caption);
        svg.querySelector("rect.h0").setAttribute("width", layer.size);
        svg.querySelector("rect.h0").setAttribute("height", layer.size);
        group.textContent = "";
        paths(layer).forEach(function (way, l) {
          if (!way) return;
          var path = document.createElementNS(NS, "path");
          path.setAttribute("class", "h" + l); path.setAttribute("d", way);
          group.appendChild(path);
        });
        svg.querySelector(".outline").setAttribute("d", layer.outline);
        svg.parentNode.querySelector("figcaption").textContent = layer.caption;
      });
      all("[data-share]", figure).forEach(function (t) {
        t.textContent = format(d.tops[i] * Number(t.dataset.share), d.unit);
      });
    }
    function point(p, r, c, x, y) {
      var layer = d.panels[p].layers[now], value = step(layer.cells, r * layer.size + c) / STEPS * d.tops[now];
      picked[p].classList.remove("hidden");
      picked[p].setAttribute("x", c); picked[p].setAttribute("y", r);
      // split and join, since a name may hold what replace() takes for a pattern
      var text = d.meaning.split("{row}").join(layer.names[r]).split("{column}").join(layer.names[c]);
      show(text + ": " + format(value, d.unit), x, y);
    }
    svgs.forEach(function (svg, p) {
      var at = [0, 0];
      svg.addEventListener("pointermove", function (e) {
        var size = d.panels[p].layers[now].size, q = within(svg, e), r = Math.floor(q.y), c = Math.floor(q.x);
        if (r < 0 || c < 0 || r >= size || c >= size) return;
        at = [r, c];
        point(p, r, c, e.clientX, e.clientY);
      });
      function leave() { picked[p].classList.add("hidden"); hide(); }
      svg.addEventListener("pointerleave", leave);
      svg.addEventListener("blur", leave);
      svg.addEventListener("keydown", function (e) {
        var move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[e.key];
        if (!move) return;
        e.preventDefault();
        var size = d.panels[p].layers[now].size;
        at = [0, 1].map(function (k) { return Math.max(0, Math.min(size - 1, at[k] + move[k])); });
        var box = svg.getBoundingClientRect();
        point(p, at[0], at[1], box.x + (at[1] + .5) / size * box.width, box.y + (at[0] + .5) / size * box.height);
      });
    });
    picker(figure, d.layers.length, d.layers, draw);
  });
})();
