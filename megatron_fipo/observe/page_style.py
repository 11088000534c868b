"""The report's style sheet, light and dark."""

from megatron_fipo.observe.curves import COLORS

CSS = """
:root { color-scheme: light dark;
  --page: #fcfcfb; --ink: #1d1f22; --soft: #63676d; --hair: #e6e5e1; --axis: #b9b8b3; --good: #2a7d4f; --bad: #b23b3b;
  --c0: #2a66ad; --c1: #cf6a1b; --c2: #2b8a66; --c3: #b13f66; --c4: #7458b4; --c5: #93802a; --c6: #3a93a8;
  --c7: #a2a5aa; }
@media (prefers-color-scheme: dark) { :root {
  --page: #15171a; --ink: #e4e5e7; --soft: #989ca3; --hair: #2a2d32; --axis: #50545b; --good: #6cc394; --bad: #e58686;
  --c0: #78aeeb; --c1: #f0a05e; --c2: #66c6a0; --c3: #ec88aa; --c4: #b29df0; --c5: #d0bd66; --c6: #74c8da;
  --c7: #73777e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 40px 28px 72px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
h1 { font-size: 26px; font-weight: 600; letter-spacing: -.01em; margin: 0; }
h2 { font-size: 17px; font-weight: 600; margin: 52px 0 14px; padding-top: 14px; border-top: 1px solid var(--hair); }
.soft, .note { color: var(--soft); }
.note { font-size: 13px; }
.warning { border-left: 3px solid var(--c1); padding: 2px 12px; margin: 18px 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 24px 30px; }
.tiles, .comparison { margin: 30px 0 0; }
.tile .label { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 22px; font-weight: 600; letter-spacing: -.015em; white-space: nowrap; line-height: 1.35; }
.tile .value i { color: var(--soft); font-style: normal; font-weight: 400; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 34px 40px; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: 4px; } figcaption b { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 0 16px; font-size: 13px; color: var(--soft); min-height: 20px; }
.key { display: inline-block; width: 14px; height: 3px; margin-right: 6px; vertical-align: middle; border-radius: 1px; }
.key.area { height: 10px; border-radius: 2px; }
.key.range { opacity: .25; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg .grid { stroke: var(--hair); } svg .axis { stroke: var(--axis); }
svg .tick { fill: var(--soft); font-size: 11.5px; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg .bar { fill: none; stroke-width: 1.2; opacity: .65; }
svg .range { opacity: .16; } svg .layer { opacity: .82; stroke: var(--page); stroke-width: .6; }
svg .hover rect { fill: transparent; } svg .mark { visibility: hidden; pointer-events: none; }
svg .hover:hover .mark { visibility: visible; } svg .rule { stroke: var(--axis); stroke-dasharray: 2 3; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; width: 100%; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: 6px 18px 6px 0; border-bottom: 1px solid var(--hair); vertical-align: top; }
th.number, td.number { text-align: right; white-space: nowrap; }
td.name { white-space: nowrap; color: var(--soft); width: 1%; padding-right: 28px; }
code { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.right { color: var(--good); } .wrong { color: var(--bad); } .right, .wrong { white-space: nowrap; font-size: 13px; }
.response { margin: 18px 0 0; } .response i { color: var(--soft); }
.shade { display: inline-block; width: 14px; height: 12px; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--soft); }
""" + "\n".join(f".dot{i} {{ fill: var(--c{i}); }}" for i in range(COLORS))
