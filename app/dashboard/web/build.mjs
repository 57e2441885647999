// Builds what browsers load, from packages pinned in package-lock.json: ../static, with a manifest of the names it made.
import { build } from "esbuild";
import { mkdir, readFile, readdir, rm, writeFile } from "node:fs/promises";
import path from "node:path";

const out = path.resolve(import.meta.dirname, "../static");
const scripts = (await readdir(path.join(import.meta.dirname, "src"))).filter((name) => name.endsWith(".ts") && !name.endsWith(".d.ts"));
const pages = scripts.filter((name) => !name.startsWith("_"));

await rm(out, { recursive: true, force: true });
await mkdir(out, { recursive: true });
const result = await build({
  absWorkingDir: import.meta.dirname,
  entryPoints: [...pages.map((name) => `src/${name}`), "styles/main.css"],
  entryNames: "[name]-[hash]",
  assetNames: "[name]-[hash]",
  chunkNames: "shared-[hash]",
  outdir: out,
  bundle: true,
  splitting: true,
  format: "esm",
  target: ["chrome120", "firefox121", "safari17"],
  loader: { ".woff2": "file" },
  minify: true,
  legalComments: "external",
  metafile: true,
});

const manifest = {};
for (const [file, made] of Object.entries(result.metafile.outputs)) {
  if (!made.entryPoint) continue;
  const entry = path.basename(made.entryPoint).replace(/\.ts$/, ".js");
  manifest[entry] = path.basename(file);
}
await writeFile(path.join(out, "manifest.json"), JSON.stringify(manifest, null, 1));

const icons = {};
for (const name of (await readFile(path.join(import.meta.dirname, "icons.txt"), "utf8")).split(/\s+/).filter(Boolean)) {
  const svg = await readFile(path.join(import.meta.dirname, `node_modules/lucide-static/icons/${name}.svg`), "utf8");
  icons[name] = svg.replace(/^[\s\S]*?<svg[\s\S]*?>/, "").replace(/<\/svg>\s*$/, "").replace(/\s+/g, " ").trim();
}
await writeFile(path.join(out, "icons.json"), JSON.stringify(icons));
