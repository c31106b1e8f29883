// Asks the page of an export in Chromium: node page.mjs PLAYWRIGHT CHROMIUM ADDRESS PICTURE QUESTION [SCREENSHOTS]
// PLAYWRIGHT is the main module of playwright-core. Prints what the page shows, and its errors.
import path from "node:path";
import { pathToFileURL } from "node:url";

const [playwright, executablePath, address, picture, question, screenshots] = process.argv.slice(2);
const { chromium } = (await import(pathToFileURL(playwright))).default;
const args = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
  + "--disable-component-update --disable-sync";
const browser = await chromium.launch({ executablePath, args: args.split(" ") });
const page = await browser.newPage({ viewport: { width: 1280, height: 800 } });
const errors = [], elsewhere = [];
page.on("pageerror", (error) => errors.push(String(error)));
page.on("console", (message) => { if (message.type() === "error") errors.push(message.text()); });
page.on("request", (request) => {
  const url = new URL(request.url());
  if (url.protocol.startsWith("http") && url.origin !== new URL(address).origin) elsewhere.push(request.url());
});
await page.goto(address);
await page.setInputFiles("input", picture);
await page.fill("textarea", question);
const over = (words) => page.waitForFunction(
  (words) => words.some((one) => document.querySelector("#status").textContent.startsWith(one)), words, { timeout: 120000 });
await over(["Ready", "The model cannot"]);
if (await page.isEnabled("button")) {
  await page.click("button");
  await over(["Done", "No answer"]);
}
const shown = await page.evaluate(() => Object.fromEntries([
  ["status", document.querySelector("#status").textContent],
  ...["answer", "time", "cache", "entries"].map((kind) => [
    kind, [...document.querySelectorAll(`.${kind}`)].map((cell) => cell.textContent),
  ]),
]));
const wide = [];
for (const width of screenshots ? [1280, 400] : []) {
  for (const colorScheme of ["light", "dark"]) {
    await page.setViewportSize({ width, height: 800 });
    await page.emulateMedia({ colorScheme });
    await page.screenshot({ path: path.join(screenshots, `${width}-${colorScheme}.png`), fullPage: true });
    wide.push(await page.evaluate(() => document.documentElement.scrollWidth - innerWidth));
  }
}
await browser.close();
console.log(JSON.stringify({ ...shown, errors, elsewhere, wide }));
