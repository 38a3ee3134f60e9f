// Loss curves on a canvas, for any number of points.

const PAD = { left: 46, right: 14, top: 14, bottom: 26 };

// A curve: ascending steps and their values; null for a loss that is not finite.
export class Curve {
  steps = [];
  values = [];

  add(step, value) {
    while (this.steps.length && this.steps.at(-1) >= step) { // repeated after a resume
      this.steps.pop();
      this.values.pop();
    }
    this.steps.push(step);
    this.values.push(value);
  }

  // Index of the point nearest to a step, -1 if there is none.
  nearest(step) {
    let [low, high] = [0, this.steps.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.steps[middle] < step) low = middle + 1;
      else high = middle;
    }
    return low > 0 && step - this.steps[low - 1] < this.steps[low] - step ? low - 1 : high;
  }
}

export class Chart {
  logX = false;
  logY = false;
  cursor = undefined; // a step
  mark = undefined; // the step of the shown sample

  // curves: {loss, train, val}
  constructor(canvas, curves) {
    Object.assign(this, { canvas, curves });
    new ResizeObserver(() => this.draw()).observe(canvas.parentNode);
    addEventListener("themechange", () => this.draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  draw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      this.paint();
    });
  }

  // First and last step of all curves.
  range() {
    const ends = Object.values(this.curves).filter((c) => c.steps.length).flatMap((c) => [c.steps[0], c.steps.at(-1)]);
    return ends.length ? [Math.min(...ends), Math.max(...ends)] : undefined;
  }

  stepAt(pixel) {
    return this.x?.back(pixel);
  }

  paint() {
    const { width, height } = this.canvas.parentNode.getBoundingClientRect();
    if (!width) return;
    const ratio = devicePixelRatio || 1;
    Object.assign(this.canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.clearRect(0, 0, width, height);
    const style = getComputedStyle(this.canvas);
    const colour = (name) => style.getPropertyValue(`--${name}`) && resolve(this.canvas, name);
    context.font = `12px ${style.fontFamily}`;
    context.fillStyle = colour("muted");
    const steps = this.range();
    const y = steps && this.yScale(height);
    if (!y) {
      this.x = undefined;
      context.textAlign = "center";
      context.fillText(steps ? "No finite loss yet." : "No points yet.", width / 2, height / 2);
      return;
    }
    const x = (this.x = scale(...spread(...steps), PAD.left, width - PAD.right, this.logX, 1));
    this.axes(context, x, y, width, height, colour);
    this.line(context, this.curves.loss, x, y, { colour: colour("loss") });
    this.line(context, this.curves.train, x, y, { colour: colour("train"), shape: "circle" });
    this.line(context, this.curves.val, x, y, { colour: colour("val"), shape: "square", dash: [5, 3] });
    if (this.mark !== undefined) this.vertical(context, x(this.mark), height, colour("text"), [2, 3], `sample: ${this.mark}`, width);
    if (this.cursor !== undefined) this.vertical(context, x(this.cursor), height, colour("accent"), []);
  }

  yScale(height) {
    let [low, high] = [Infinity, -Infinity];
    for (const { values } of Object.values(this.curves)) {
      for (const v of values) {
        if (v === null || (this.logY && v <= 0)) continue;
        if (v < low) low = v;
        if (v > high) high = v;
      }
    }
    if (low > high) return undefined;
    const room = this.logY ? 0 : (high - low) * 0.05;
    return scale(...spread(low - room, high + room), height - PAD.bottom, PAD.top, this.logY, 0);
  }

  axes(context, x, y, width, height, colour) {
    context.strokeStyle = colour("line");
    context.lineWidth = 1;
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const value of y.ticks(5)) {
      const at = Math.round(y(value)) + 0.5;
      context.beginPath();
      context.moveTo(PAD.left, at);
      context.lineTo(width - PAD.right, at);
      context.stroke();
      context.fillText(short(value), PAD.left - 8, at);
    }
    context.textAlign = "center";
    context.textBaseline = "top";
    let free = -Infinity; // labels must not overlap
    for (const value of x.ticks(Math.max(2, Math.floor(width / 110)))) {
      const half = context.measureText(short(value)).width / 2;
      if (x(value) - half < free) continue;
      context.fillText(short(value), Math.min(x(value), width - half), height - PAD.bottom + 8);
      free = x(value) + half + 12;
    }
  }

  // If there are more points than pixels: the mean of each column as a line, and a band between its extremes.
  line(context, { steps, values }, x, y, { colour, shape, dash = [] }) {
    const dense = steps.length > 2 * (x.to - x.from);
    const path = new Path2D();
    const band = new Path2D();
    let pen = false;
    const to = (px, py) => ((pen ? path.lineTo(px, py) : path.moveTo(px, py)), (pen = true));
    const dots = [];
    for (let i = 0; i < steps.length; ) {
      if (!drawable(values[i], this.logY)) {
        pen = false;
        i++;
        continue;
      }
      const px = x(steps[i]);
      if (!dense) {
        dots.push([px, y(values[i]), !pen && !drawable(values[i + 1], this.logY)]);
        to(px, y(values[i++]));
        continue;
      }
      let [low, high, sum, count] = [Infinity, -Infinity, 0, 0];
      const column = Math.floor(px);
      for (; i < steps.length && Math.floor(x(steps[i])) === column && drawable(values[i], this.logY); i++) {
        low = Math.min(low, values[i]);
        high = Math.max(high, values[i]);
        sum += values[i];
        count++;
      }
      band.moveTo(column + 0.5, y(low) + 0.5);
      band.lineTo(column + 0.5, y(high) - 0.5);
      to(column + 0.5, y(sum / count));
    }
    context.save();
    context.strokeStyle = context.fillStyle = colour;
    context.lineWidth = 1;
    context.globalAlpha = 0.3;
    context.stroke(band);
    context.globalAlpha = 1;
    context.lineWidth = shape ? 2 : 1.25;
    context.lineJoin = "round";
    context.setLineDash(dash);
    context.stroke(path);
    const marked = shape && dots.length < (x.to - x.from) / 8;
    for (const [px, py, alone] of dots) {
      if (!marked && !alone) continue;
      context.beginPath();
      if (shape === "square") context.rect(px - 3, py - 3, 6, 6);
      else context.arc(px, py, shape ? 3.2 : 2, 0, 7);
      context.fill();
    }
    context.restore();
  }

  vertical(context, at, height, colour, dash, text = "", width = 0) {
    context.save();
    context.strokeStyle = context.fillStyle = colour;
    context.setLineDash(dash);
    context.beginPath();
    context.moveTo(Math.round(at) + 0.5, PAD.top);
    context.lineTo(Math.round(at) + 0.5, height - PAD.bottom);
    context.stroke();
    context.textAlign = at > width / 2 ? "right" : "left";
    context.textBaseline = "top";
    context.fillText(text, at + (at > width / 2 ? -6 : 6), PAD.top);
    context.restore();
  }
}

const drawable = (value, log) => value !== null && value !== undefined && (!log || value > 0);

// A range that is not empty.
const spread = (low, high) => (low < high ? [low, high] : [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1]);

// A custom property, possibly light-dark(), as a colour for a canvas.
function resolve(node, name) {
  node.style.color = `var(--${name})`;
  return getComputedStyle(node).color;
}

// A function from values to pixels. shift is added before the logarithm, because steps begin at 0.
function scale(low, high, from, to, log, shift) {
  const into = log ? (v) => Math.log(Math.max(v + shift, 1e-9)) : (v) => v;
  const [a, b] = [into(low), into(high)];
  const map = (value) => from + ((into(value) - a) / (b - a)) * (to - from);
  map.from = Math.min(from, to);
  map.to = Math.max(from, to);
  map.back = (pixel) => {
    const v = a + ((pixel - from) / (to - from)) * (b - a);
    return log ? Math.exp(v) - shift : v;
  };
  map.ticks = (count) => {
    const decades = log && (high + shift) / Math.max(low + shift, 1e-9) > 20;
    const all = decades ? [0, ...powers(Math.max(low, shift || low), high)] : even(low, high, count);
    return all.filter((v) => v >= low && v <= high);
  };
  return map;
}

function powers(low, high) {
  const all = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const digit of [1, 2, 5]) all.push(digit * 10 ** power);
  }
  return all;
}

function even(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((digit) => digit * power >= rough) ?? 10);
  const all = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) all.push(k * step);
  return all;
}

function short(value) {
  if (Math.abs(value) >= 10_000) return Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(value);
  return String(Number(value.toPrecision(4)));
}
