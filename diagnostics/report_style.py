"""The look of reports, and the two things that a click does there; no network, and all of it readable without scripts."""

from diagnostics.card_style import PAGE, STYLE
from diagnostics.result_html import RESULT_STYLE

_RULES = """
html{scroll-behavior:smooth}
.mdc.report{max-width:1320px}
.mdc .lead{margin:.5em 0 0;font-size:1.02em}
.mdc nav ol{list-style:decimal;padding-left:1.5em;columns:2 22em;margin:.4em 0}
.mdc nav li{break-inside:avoid;padding:.1em 0}
.mdc section{scroll-margin-top:1em}
.mdc h2 small{display:block;font-weight:400;font-size:.84em;color:var(--soft);margin-top:.15em}
.mdc .heads td{white-space:normal;vertical-align:baseline}
.mdc .heads td:first-child{width:46%}
.mdc .heads td.value{white-space:nowrap}
.mdc .figures{display:grid;gap:14px}
.mdc figure img{margin:0}
.mdc figcaption{margin-top:.2em}
.mdc thead th button{all:unset;cursor:pointer;font:inherit;color:inherit}
.mdc thead th button:hover{text-decoration:underline}
.mdc thead th button:focus-visible{outline:2px solid var(--mark);outline-offset:2px;border-radius:2px}
.mdc th[aria-sort=ascending] button::after{content:" ↑"}
.mdc th[aria-sort=descending] button::after{content:" ↓"}
.scripted .mdc .folded tr.more{display:none}
.mdc button.all{font:inherit;font-size:.88em;margin:.5em 0 0;padding:.25em .8em;border:1px solid var(--line);border-radius:5px;
background:var(--panel);color:var(--ink);cursor:pointer;display:none}
.scripted .mdc button.all{display:inline-block}
.mdc dl.facts{display:grid;grid-template-columns:max-content 1fr;gap:.15em 1.1em;margin:.5em 0;font-size:.95em}
.mdc dl.facts dd{font-size:1em;font-weight:400;overflow-wrap:anywhere;margin:0;min-width:0}
.mdc dl.facts dt{font-size:1em}
@media(max-width:560px){.mdc figure{overflow-x:auto}.mdc figure img{max-width:none;width:max(100%,660px)}.mdc dl.facts{grid-template-columns:1fr}.mdc dl.facts dd{margin-bottom:.3em}
.mdc .heads thead{display:none}.mdc .heads tr{display:block;padding:.5em 0;border-bottom:1px solid var(--line)}
.mdc .heads td{display:block;border:0;padding:0;text-align:left}.mdc .heads td:first-child{width:auto}}
@media print{.mdc.report{max-width:none;padding:0}.mdc details{display:none}.mdc button.all{display:none!important}
.mdc section{break-before:page}.mdc .scroll{overflow:visible}.mdc table{font-size:.72em}.mdc th,.mdc td{white-space:normal}
.mdc img,.mdc tr{break-inside:avoid}}
"""
REPORT_STYLE = STYLE + RESULT_STYLE + _RULES + PAGE

SCRIPT = """
document.documentElement.classList.add('scripted');
function key(cell){return cell.dataset.v===undefined?null:Number(cell.dataset.v)}
function ordered(a,b,down){
  if((a===null)!==(b===null))return a===null?1:-1;
  return a===null?0:(down?b-a:a-b);
}
document.addEventListener('click',event=>{
  const all=event.target.closest('button.all');
  if(all){
    const box=document.getElementById(all.getAttribute('aria-controls')),folded=box.classList.toggle('folded');
    all.setAttribute('aria-expanded',String(!folded));
    all.textContent=folded?all.dataset.more:all.dataset.fewer;
    return;
  }
  const head=event.target.closest('thead th');
  if(!head||!head.hasAttribute('aria-sort'))return;
  const table=head.closest('table'),body=table.tBodies[0],at=head.cellIndex;
  const numbers=!head.classList.contains('words');
  const down=head.getAttribute('aria-sort')==='none'?numbers:head.getAttribute('aria-sort')==='ascending';
  for(const other of head.parentNode.cells)other.setAttribute('aria-sort','none');
  head.setAttribute('aria-sort',down?'descending':'ascending');
  const shown=[...body.rows].filter(row=>!row.classList.contains('more')).length;
  const rows=[...body.rows].sort((x,y)=>{
    const a=x.cells[at],b=y.cells[at];
    if(numbers)return ordered(key(a),key(b),down);
    const c=a.textContent.localeCompare(b.textContent,'en',{numeric:true});
    return down?-c:c;
  });
  rows.forEach((row,n)=>{row.classList.toggle('more',n>=shown);body.append(row)});
});
"""
