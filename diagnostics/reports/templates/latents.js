'use strict';
const HEIGHT=30,OVER=6,data=JSON.parse(document.getElementById('data').textContent);
const columns=data.columns,by={};
for(const column of columns){
  by[column.name]=column;
  column.words=['name','tokens'].includes(column.kind);
  column.at=column.levels?row=>column.levels[column.values[row]]:row=>column.values[row];
  column.number=column.words?null:Float64Array.from(column.values,v=>v===null?NaN:Number(v));
}
const box=document.getElementById('box'),grid=document.getElementById('grid'),body=grid.tBodies[0],heads=[...grid.tHead.rows[0].cells];
const form=document.getElementById('filters'),found=document.getElementById('found'),card=document.getElementById('card');
const WIDTH={count:58,number:76,share:74,yes:56,tokens:190,name:60};
columns.forEach((column,n)=>{
  const longest=column.kind==='name'?Math.max(...column.levels.map(level=>level.length)):0;
  heads[n].style.width=Math.max(WIDTH[column.kind],7.2*column.label.length+28,Math.min(7.4*longest+18,260))+'px';
});

// Text: numbers as everywhere in our pages.
function short(x){
  if(Number.isNaN(x))return '–';
  if(!Number.isFinite(x))return x>0?'∞':'−∞';
  const size=Math.abs(x);
  let text;
  if(size&&(size<1e-3||size>=1e5)){
    const [mantissa,power]=x.toExponential(1).split('e');
    const raised=String(Number(power)).replace(/[-\d]/g,c=>c==='-'?'⁻':'⁰¹²³⁴⁵⁶⁷⁸⁹'[c]);
    text=(mantissa.replace(/\.0$/,'')+'·').replace(/^1·$/,'')+'10'+raised;
  }else text=size>=1e3?Math.round(x).toLocaleString('en'):String(Number(x.toPrecision(3)));
  return text.replace('-','−');
}
const percent=x=>Number.isFinite(x)?short(100*x)+' %':'–';
const value=(name,row)=>by[name].number[row];
function text(column,row){
  if(column.words)return column.at(row);
  const x=column.number[row];
  if(column.kind==='share')return percent(x);
  if(column.kind==='yes')return x?'yes':'';
  return column.kind==='count'?(column.name==='latent'||column.name==='layer'?String(x):x.toLocaleString('en')):short(x);
}

// Which rows, in which order. A column's places are computed once: row -> rank, nan last either way.
const all=Uint32Array.from({length:data.n},(_,row)=>row);
let order=all,sorted=all,chosen={name:'kl',down:true},active=0,searched=null;
function sort(){
  const column=by[chosen.name],down=chosen.down;
  sorted=all.slice();
  if(column.words&&!column.rank){
    const levels=[...new Set(column.levels||column.values)].sort(column.levels?new Intl.Collator('en',{numeric:true}).compare:undefined);
    const ranks=new Map(levels.map((level,n)=>[level,n]));
    column.rank=Float64Array.from(all,row=>column.at(row)===''?NaN:ranks.get(column.at(row)));
  }
  const key=column.words?column.rank:column.number;
  sorted.sort((a,b)=>{
    const x=key[a],y=key[b];
    if(x!==x||y!==y)return x===x?-1:y===y?1:a-b;
    return (down?y-x:x-y)||a-b;
  });
  heads.forEach((head,n)=>head.setAttribute('aria-sort',columns[n]===column?(down?'descending':'ascending'):'none'));
}
function filter(){
  const asked=new FormData(form),words=asked.get('text').trim().toLowerCase(),verdicts=new Set(asked.getAll('verdict'));
  if(words&&!searched)searched=Array.from(all,row=>(by.promoted.at(row)+'\n'+by.suppressed.at(row)).toLowerCase());
  const latent=/^\d+$/.test(words)?Number(words):-1,sae=asked.get('sae')||'';
  const frequency=(Number(asked.get('frequency'))||0)/100,rows=Number(asked.get('rows'))||0;
  order=sorted.filter(row=>(!sae||by.sae.at(row)===sae)&&verdicts.has(by.verdict.at(row))
    &&!(value('frequency',row)<frequency)&&!(value('rows',row)<rows)
    &&(!words||value('latent',row)===latent||searched[row].includes(words)));
  found.textContent=order.length.toLocaleString('en')+' of '+data.n.toLocaleString('en');
  grid.setAttribute('aria-rowcount',order.length+1);
  active=0;
  box.scrollTop=0;
  draw(true);
}

// Only rows in view, and a few around them, are in the document; two empty rows keep the place of the others.
const space=[0,1].map(()=>{
  const row=body.insertRow(),cell=row.insertCell();
  row.className='space';
  row.setAttribute('aria-hidden','true');
  cell.colSpan=columns.length;
  return {row,cell};
});
let lines=new Map(),drawn=[-1,-1]; // lines: those in the document, by place in the order
function made(){
  const line=document.createElement('tr');
  line.className='row';
  for(const column of columns)line.insertCell().className=column.kind+(column.main?'':' more');
  return line;
}
function fill(line,place,every){
  const row=order[place];
  line.id='row-'+place;
  line.setAttribute('aria-rowindex',place+2);
  columns.forEach((column,m)=>{
    if(!column.main&&!every)return;
    const cell=line.cells[m],said=text(column,row);
    if(cell.firstChild)cell.firstChild.data=said;else cell.append(said);
    if(column.kind==='tokens')cell.title=said;
    if(column.name==='verdict')cell.classList.toggle('above',said==='more than dose');
  });
}
function draw(anew){
  const tall=Math.ceil(box.clientHeight/HEIGHT)+2*OVER;
  const first=Math.max(0,Math.min(Math.floor(box.scrollTop/HEIGHT)-OVER,order.length-tall)),last=Math.min(order.length,first+tall);
  if(!anew&&first===drawn[0]&&last===drawn[1])return;
  drawn=[first,last];
  const every=grid.classList.contains('every'),free=[],kept=new Map();
  for(const [place,line] of lines){
    if(place>=first&&place<last)kept.set(place,line);else free.push(line);
  }
  let after=space[1].row;
  for(let place=last-1;place>=first;place--){
    let line=kept.get(place);
    if(!line){line=free.pop()||made();kept.set(place,line);fill(line,place,every)}
    else if(anew)fill(line,place,every);
    line.setAttribute('aria-selected',String(place===active));
    if(line.nextSibling!==after)body.insertBefore(line,after);
    after=line;
  }
  for(const line of free)line.remove();
  lines=kept;
  space[0].cell.style.height=first*HEIGHT+'px';
  space[1].cell.style.height=(order.length-last)*HEIGHT+'px';
  space[0].row.hidden=!first;
  space[1].row.hidden=last>=order.length;
  if(order.length)grid.setAttribute('aria-activedescendant','row-'+active);
  else grid.removeAttribute('aria-activedescendant');
}
function go(place){
  active=Math.max(0,Math.min(order.length-1,place));
  const above=active*HEIGHT,below=above+HEIGHT+grid.tHead.offsetHeight-box.clientHeight;
  if(box.scrollTop>above)box.scrollTop=above;
  else if(box.scrollTop<below)box.scrollTop=below;
  drawn=[-1,-1];
  draw(false);
}
let asked=false;
box.addEventListener('scroll',()=>{
  if(!asked){asked=true;requestAnimationFrame(()=>{asked=false;draw(false)})}
},{passive:true});
new ResizeObserver(()=>draw(false)).observe(box);
form.addEventListener('submit',event=>event.preventDefault());
form.addEventListener('input',event=>{
  if(event.target.name==='every'){grid.classList.toggle('every',event.target.checked);draw(true)}
  else filter();
});
form.addEventListener('reset',()=>setTimeout(()=>{grid.classList.remove('every');filter()}));
grid.tHead.addEventListener('click',event=>{
  const head=event.target.closest('th');
  if(!head)return;
  const column=columns[head.cellIndex];
  chosen={name:column.name,down:chosen.name===column.name?!chosen.down:!column.words&&column.name!=='latent'&&column.name!=='p'&&column.name!=='q'};
  sort();
  filter();
});
const step=()=>Math.max(1,Math.floor((box.clientHeight-grid.tHead.offsetHeight)/HEIGHT)-1);
grid.addEventListener('keydown',event=>{
  if(event.target!==grid||event.ctrlKey||event.altKey||event.metaKey||!order.length)return;
  const to={ArrowDown:active+1,ArrowUp:active-1,PageDown:active+step(),PageUp:active-step(),Home:0,End:order.length-1}[event.key];
  if(to!==undefined)go(to);
  else if(event.key==='Enter'||event.key===' ')open(active);
  else return;
  event.preventDefault();
});
body.addEventListener('click',event=>{
  const line=event.target.closest('tr.row');
  if(line&&!String(getSelection()))open(Number(line.id.slice(4)));
});

// The card of a latent.
function h(name,attributes,...inside){
  const made=document.createElement(name);
  for(const [key,given] of Object.entries(attributes||{}))made.setAttribute(key,given);
  made.append(...inside);
  return made;
}
function svg(name,attributes,...inside){
  const made=document.createElementNS('http://www.w3.org/2000/svg',name);
  for(const [key,given] of Object.entries(attributes))made.setAttribute(key,given);
  made.append(...inside);
  return made;
}
const interval=(row,name)=>{
  const low=value(name+'_low',row),high=value(name+'_high',row);
  return Number.isNaN(low)&&Number.isNaN(high)?'no interval':'['+short(low)+', '+short(high)+']';
};
// KL, its interval, the direct part and the placebo on one logarithmic axis.
function chart(row){
  const lines=[['KL',value('kl',row),value('kl_low',row),value('kl_high',row)],['placebo KL',value('kl_placebo',row)],['direct KL',value('kl_direct',row)]];
  const there=lines.flatMap(line=>line.slice(1)).filter(x=>x>0&&Number.isFinite(x));
  if(!there.length||!(value('kl',row)>0))return '';
  const low=Math.floor(Math.log10(Math.min(...there))),high=Math.max(low+1,Math.ceil(Math.log10(Math.max(...there))));
  const wide=Math.min(640,innerWidth-40),x=v=>90+(wide-120)*(Math.log10(v)-low)/(high-low);
  const picture=svg('svg',{class:'kl',viewBox:'0 0 '+wide+' 112',role:'img','aria-label':'KL beside its placebo, nats, logarithmic axis'});
  const every=Math.ceil(70*(high-low)/(wide-120));
  for(let power=low;power<=high;power+=every){
    picture.append(svg('line',{class:'grid',x1:x(10**power),x2:x(10**power),y1:6,y2:84}),
      svg('text',{x:x(10**power),y:102,'text-anchor':'middle'},short(10**power)));
  }
  lines.forEach(([name,at,from,to],n)=>{
    const y=18+26*n;
    picture.append(svg('text',{class:'label',x:78,y:y+4,'text-anchor':'end'},name));
    if(from>0&&Number.isFinite(to))picture.append(svg('line',{class:'whisker',x1:x(from),x2:x(to),y1:y,y2:y}));
    if(at>0)picture.append(svg('circle',{class:n===1?'placebo':'dot pos',cx:x(at),cy:y,r:5}));
  });
  return h('figure',{},picture,h('figcaption',{},'Medians over '+text(by.rows,row)+' rows, nats; bar: 95 % interval, prompts as clusters.'));
}
const tokens=(row,name)=>{
  const said=by[name].at(row).split('  ').filter(Boolean);
  return h('div',{},h('h3',{},by[name].label[0].toUpperCase()+by[name].label.slice(1)),
    said.length?h('p',{class:'list'},...said.map(token=>h('code',{},token))):h('p',{class:'soft'},'none'));
};
let firsts=null;
function examples(row){
  const e=data.examples;
  if(!e.of||!e.of.length)return [];
  if(!firsts){firsts=new Map();e.of.forEach((of,n)=>{if(!firsts.has(of))firsts.set(of,n)})}
  if(!firsts.has(row))return [];
  const names=Object.keys(e).filter(name=>name!=='of'),titles={kl_placebo:'placebo KL',kl_direct:'direct KL',kl:'KL'},lines=[];
  for(let n=firsts.get(row);n<e.of.length&&e.of[n]===row;n++)
    lines.push(h('tr',{},...names.map(name=>h('td',{},e[name][n]===null?'–':name==='prompt'||name==='position'?String(e[name][n]):short(Number(e[name][n]))))));
  return [h('h3',{},'Rows of largest KL'),h('div',{class:'scroll'},h('table',{},
    h('thead',{},h('tr',{},...names.map(name=>h('th',{scope:'col'},titles[name]||name)))),h('tbody',{},...lines)))];
}
let shown=0,before=null;
function open(place){
  shown=Math.max(0,Math.min(order.length-1,place));
  const row=order[shown],sae=by.sae.at(row),latent=value('latent',row),verdict=by.verdict.at(row);
  const tile=(name,said,more)=>h('div',{},h('dt',{},name),h('dd',{},said,h('small',{},more)));
  const button=(said,label,act,off)=>{
    const made=h('button',{type:'button',class:'control','aria-label':label},said);
    made.disabled=Boolean(off);
    made.addEventListener('click',act);
    return made;
  };
  const measured=value('rows',row)>0;
  card.replaceChildren(
    h('div',{class:'bar-top'},h('h2',{id:'card-title'},'Latent '+latent+' of '+sae),
      button('←','Previous latent',()=>open(shown-1),shown===0),button('→','Next latent',()=>open(shown+1),shown===order.length-1),
      button('Close','Close',()=>card.close())),
    h('p',{},h('b',{},verdict),verdict?': '+(data.verdicts[verdict]||''):'no verdict'),
    h('p',{class:'soft'},'Block '+text(by.layer,row)+', '+by.point.at(row)+'. '+(shown+1).toLocaleString('en')+' of '+order.length.toLocaleString('en')+' in this order.'),
    h('dl',{class:'tiles'},
      tile('fires on',percent(value('frequency',row)),text(by.firings,row)+' tokens'),
      tile('rows',text(by.rows,row),text(by.prompts,row)+' prompts'+(value('short',row)?'; fewer than asked for':'')),
      ...(measured?[
        tile('median KL, nats',short(value('kl',row)),interval(row,'kl')),
        tile('placebo KL, nats',short(value('kl_placebo',row)),'same ‖Δx‖ and angle'),
        tile('÷ placebo (median)',short(value('over_placebo',row)),interval(row,'over_placebo')),
        tile('direct KL, nats',short(value('kl_direct',row)),'straight to the unembedding'),
        tile('top-1 token changes',percent(value('top1_changed',row)),'of its rows'),
        tile('q',short(value('q',row)),'p '+short(value('p',row))),
        tile('dose ‖z·d‖/‖x‖',short(value('dose',row)),'median'),
        tile('median z',short(value('median_z',row)),'largest '+short(value('max_z',row)))]:[])),
    measured?chart(row):'',
    h('div',{class:'pair'},tokens(row,'promoted'),tokens(row,'suppressed')),
    ...examples(row),
    h('h3',{},'The full card'),h('pre',{style:'user-select:all'},data.commands[sae].replace('{latent}',latent)));
  if(!card.open){before=document.activeElement;card.showModal()}
  card.scrollTop=0;
}
card.addEventListener('keydown',event=>{
  if(event.key==='ArrowLeft'&&shown>0)open(shown-1);
  else if(event.key==='ArrowRight'&&shown<order.length-1)open(shown+1);
  else return;
  event.preventDefault();
});
card.addEventListener('click',event=>{if(event.target===card)card.close()});
card.addEventListener('close',()=>{go(shown);if(before===document.body||before===null)grid.focus({preventScroll:true})});
sort();
filter();
