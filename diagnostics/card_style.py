"""The look of cards: one style sheet, its colours for light and dark pages, nothing from elsewhere."""

_LIGHT = (
    "--ink:#1b1f24;--soft:#57606a;--line:#d8dee4;--page:#fff;--panel:#f6f8fa;--pos:86 180 233;--neg:240 150 50;--mark:#0072b2;"
    "--minus:#b34e00;--all:#c3c9d0;--effect:27 31 36"
)
_DARK = (
    "--ink:#e6e9ee;--soft:#a3adb8;--line:#3a424c;--page:#14181d;--panel:#1d232a;--pos:0 114 178;--neg:176 84 0;--mark:#56b4e9;"
    "--minus:#f0993c;--all:#4d5762;--effect:240 243 246"
)
_RULES = """
.mdc{color:var(--ink);background:var(--page);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
max-width:960px;margin:0 auto;padding:20px 18px 28px;box-sizing:border-box;text-align:left}
.mdc *{box-sizing:border-box}
.mdc h1{font-size:1.6em;line-height:1.2;margin:0;font-weight:650}
.mdc h2{font-size:1.05em;margin:1.9em 0 .5em;padding-top:.7em;border-top:1px solid var(--line);font-weight:650}
.mdc h3{font-size:.95em;margin:1.1em 0 .3em;font-weight:600}
.mdc p{margin:.35em 0}
.mdc .soft,.mdc figcaption,.mdc .meta{color:var(--soft);font-size:.86em}
.mdc .tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:14px 0 0;padding:0}
.mdc .tiles div{background:var(--panel);border-radius:6px;padding:8px 11px}
.mdc .tiles dt,.mdc .tiles dd{float:none;width:auto;padding:0}
.mdc .tiles dt{color:var(--soft);font-size:.8em;line-height:1.3}
.mdc .tiles dd{margin:2px 0 0;font-size:1.2em;font-weight:600;font-variant-numeric:tabular-nums;line-height:1.25}
.mdc .tiles dd small{display:block;font-size:.67em;font-weight:400;color:var(--soft)}
.mdc .charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr));gap:16px 26px}
.mdc figure{margin:0}
.mdc svg{display:block;width:100%;height:auto;overflow:visible}
.mdc svg text{fill:var(--soft);font:11.5px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
.mdc svg text.label{fill:var(--ink)}
.mdc svg .grid{stroke:var(--line);stroke-width:.7}
.mdc svg .axis,.mdc svg .whisker{stroke:var(--ink);stroke-width:1}
.mdc svg .dashed{stroke:var(--ink);stroke-width:1;stroke-dasharray:4 3}
.mdc svg .bar.all{fill:var(--all)}
.mdc svg .bar.pos,.mdc svg .bar.plain,.mdc svg .dot.pos{fill:var(--mark)}
.mdc svg .bar.plain{opacity:.75}
.mdc svg .bar.neg,.mdc svg .dot.neg{fill:var(--minus)}
.mdc svg .dot{opacity:.7}
.mdc svg .step{fill:none;stroke:var(--mark);stroke-width:1.7}
.mdc svg .placebo{fill:none;stroke:var(--soft);stroke-width:.8;opacity:.75}
.mdc ol:not(.list-inline){list-style:none;margin:0;padding:0}
.mdc li.text{padding:7px 0 8px;border-bottom:1px solid var(--line)}
.mdc .run{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.75}
.mdc .run .t{border-radius:2px;padding:1px 0 2px}
.mdc .run .p{--c:var(--pos)}
.mdc .run .n{--c:var(--neg)}
.mdc .run .p,.mdc .run .n{background:rgb(var(--c)/calc(.12 + .78*var(--z)));box-shadow:inset 0 -3px 0 rgb(var(--effect)/var(--k,0))}
.mdc .run .peak{outline:1.5px solid var(--ink);outline-offset:0;margin:0 1px;padding-left:1px;padding-right:1px}
.mdc .run .w{color:var(--soft)}
.mdc .key{display:inline-block;width:1.5em;height:1em;vertical-align:-.15em;border-radius:2px;margin:0 .15em}
.mdc code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;background:var(--panel);border-radius:3px;
padding:0 .25em;white-space:pre-wrap;overflow-wrap:anywhere;color:inherit}
.mdc .pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:6px 28px}
.mdc .scroll{overflow-x:auto}
.mdc table{border-collapse:collapse;table-layout:auto;width:100%;font-size:.9em;font-variant-numeric:tabular-nums;margin:0;color:inherit}
.mdc th,.mdc td{text-align:right;padding:3px 8px;border-bottom:1px solid var(--line);background:none;white-space:nowrap}
.mdc th{font-weight:600;color:var(--soft)}
.mdc th:first-child,.mdc td:first-child{text-align:left;padding-left:0}
.mdc td.grow{width:45%;padding-right:0}
.mdc .meter{display:block;height:.75em;border-radius:2px;background:var(--mark)}
.mdc .meter.neg{background:var(--minus)}
.mdc a{color:var(--mark)}
.mdc details{margin-top:.6em;font-size:.86em}
.mdc summary{cursor:pointer;color:var(--soft)}
.mdc pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--panel);color:inherit;padding:10px;border-radius:6px;font-size:.92em}
"""

STYLE = (
    f".mdc{{{_LIGHT};color-scheme:light}}"
    f"@media(prefers-color-scheme:dark){{.mdc{{{_DARK};color-scheme:dark}}}}"
    f'[data-jp-theme-light="true"] .mdc,.vscode-light .mdc{{{_LIGHT};color-scheme:light}}'
    f'[data-jp-theme-light="false"] .mdc,.vscode-dark .mdc{{{_DARK};color-scheme:dark}}' + _RULES
)
"""Of `.mdc`. Light or dark as the reader's system says, or as a notebook's theme does where it is known."""
PAGE = "body{margin:0;background:#fff}@media(prefers-color-scheme:dark){body{background:#14181d}}"
"""Of the page around a card that stands alone."""
