"""CSS of the report page."""

STYLE = """
:root { --ink: #1f2733; --soft: #667080; --line: #dfe3e8; --back: #f6f7f9; --accent: #2f6f9f; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
header { background: #fff; border-bottom: 1px solid var(--line); padding: 28px 0 20px; }
header > *, main { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
h1 { font-size: 26px; font-weight: 650; letter-spacing: -0.01em; overflow-wrap: anywhere; }
header p { color: var(--soft); margin-top: 4px; overflow-wrap: anywhere; }
main { padding-bottom: 60px; }
h2 { font-size: 18px; font-weight: 650; margin: 36px 0 10px; }
h3 { font-size: 14px; font-weight: 600; margin: 0 0 4px; }
.note, figcaption { color: var(--soft); font-size: 13px; margin: 2px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px;
  margin-top: 24px; }
.tile, .pictures figure, .prompt, details { background: #fff; border: 1px solid var(--line);
  border-radius: 8px; padding: 14px 16px; }
.tile .name { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr));
  gap: 14px; }
.pictures img { width: 100%; display: block; }
.prompt { margin-bottom: 14px; }
.prompt p { margin: 0 0 10px; font-weight: 500; overflow-wrap: anywhere; }
.prompt > div { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); }
video { width: 100%; display: block; border-radius: 4px; background: #000; }
.far { padding: 12px; border: 1px dashed var(--line); border-radius: 4px; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: 13px; background: #fff;
  border: 1px solid var(--line); }
th, td { text-align: left; padding: 5px 10px; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.facts { border: 0; }
.facts th { font-weight: 500; color: var(--soft); width: 34%; }
details { margin-bottom: 10px; }
summary { cursor: pointer; font-weight: 600; font-size: 14px; }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media print { body { background: #fff; } .pictures figure, .prompt { break-inside: avoid; } }
"""
