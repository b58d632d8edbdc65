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
