// Builds the page into the Python package, which has it committed: `npm ci && npm run build`.
import { build } from "esbuild";

await build({
  entryPoints: { view: "src/main.tsx" },
  outdir: "../src/tokendance/view/assets",
  bundle: true,
  minify: true,
  format: "iife",
  target: ["es2022"],
  charset: "ascii", // it may be put into a page of any encoding
  legalComments: "none",
  logLevel: "info",
  jsx: "automatic",
  jsxImportSource: "preact",
});
