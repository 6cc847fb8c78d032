// WCAG 2.2: every piece of text, icon and edge of a field on the page against what lies behind it, half-transparent
// colours laid over each other. Returns how many pieces of text were seen, and what stands out too little.
const pen = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
const rgba = color => {
  pen.clearRect(0, 0, 1, 1);
  pen.fillStyle = color;
  pen.fillRect(0, 0, 1, 1);
  const [red, green, blue, alpha] = pen.getImageData(0, 0, 1, 1).data;
  return [red, green, blue, alpha / 255];
};
const over = (top, under) => [0, 1, 2].map(n => top[n] * top[3] + under[n] * (1 - top[3]));
const behind = node => node ? over(rgba(getComputedStyle(node).backgroundColor), behind(node.parentElement)) : [255, 255, 255];
const linear = part => part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4;
const luminance = color => color.reduce((sum, part, n) => sum + linear(part) * [0.2126, 0.7152, 0.0722][n], 0);
const contrast = (color, ground) => {
  const [dark, bright] = [over(rgba(color), ground), ground].map(luminance).sort((one, two) => one - two);
  return (bright + 0.05) / (dark + 0.05);
};
const visible = node => node.checkVisibility({ visibilityProperty: true }) && !node.closest(".sr, option, script, :disabled");
const faint = [];
let seen = 0;
const check = (node, color, what) => {
  const { fontSize, fontWeight } = getComputedStyle(node), size = parseFloat(fontSize);
  const least = size >= 24 || size >= 18.66 && fontWeight >= 700 ? 3 : 4.5, is = contrast(color, behind(node));
  seen++;
  if (is < least) faint.push([what, is]);
};
for (const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT); walk.nextNode();) {
  const text = walk.currentNode.data.trim(), node = walk.currentNode.parentElement;
  if (text && visible(node)) check(node, getComputedStyle(node).color, text);
}
for (const node of document.querySelectorAll("textarea, input"))
  if (node.placeholder && visible(node)) check(node, getComputedStyle(node, "::placeholder").color, node.placeholder);
for (const node of document.querySelectorAll("button svg, .field, dialog input:not([type=range]), dialog textarea")) {
  const style = getComputedStyle(node), line = node.localName === "svg" ? style.color : style.borderTopColor;
  const is = contrast(line, behind(node.parentElement));
  if (visible(node) && is < 3) faint.push([node.id || node.innerHTML, is]);
}
return [seen, faint];
