"""A text as a model reads it, as one HTML page: nothing is fetched, and everything can be hovered over."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """title, facts: lines at the top
    tokens: of the text, as text
    rows: names of what the lens looked at; said: of each row and token the likeliest next tokens, as text; chances: fp64
        [rows, S, top], of each; entropy: fp64 [rows, S], in nats. Empty for a model without logits
    weights: of attention, [layers, N, S, S]
    """

    title: str
    facts: str
    tokens: Sequence[str]
    rows: Sequence[str]
    said: Sequence[Sequence[Sequence[str]]]
    chances: Tensor
    entropy: Tensor
    weights: Tensor


def page_of(reading: Reading) -> str:
    """Weights of attention are rounded to 1/255."""
    layers, heads = reading.weights.shape[:2]
    quantised = (reading.weights.clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
    words = sorted({word for row in reading.said for cell in row for word in cell})
    number = {word: place for place, word in enumerate(words)}
    data: dict[str, Any] = {
        "tokens": list(reading.tokens),
        "layers": layers,
        "heads": heads,
        "rows": list(reading.rows),
        "words": words,
        "said": [[[number[word] for word in cell] for cell in row] for row in reading.said],
        "chances": [[[round(one, 4) for one in cell] for cell in row] for row in reading.chances.tolist()],
        "entropy": [[round(one, 3) for one in row] for row in reading.entropy.tolist()],
        "weights": base64.b64encode(quantised.numpy().tobytes()).decode(),
    }
    content = json.dumps(data, ensure_ascii=False).replace("</", "<\\/")
    filled = {"TITLE": escape(reading.title), "FACTS": escape(reading.facts), "DATA": content}
    parts = _PAGE.split("%%")  # odd ones are names
    return "".join(filled[part] if place % 2 else part for place, part in enumerate(parts))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>%%TITLE%%</title>
<style>
:root{--ink:#1f2933;--muted:#6b7684;--grid:#e3e7ec;--paper:#fff;--mark:#4c78a8;--next:#c2571a}
body{margin:24px auto;max-width:1180px;padding:0 20px;font:14px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--paper)}
h1{font-size:19px;margin:0}h2{font-size:15px;margin:28px 0 4px}p{margin:2px 0 10px;color:var(--muted)}
#text{line-height:2.1;font-family:ui-monospace,monospace}
#text span{padding:3px 1px;border-radius:3px;cursor:default;white-space:pre}
#text span.query{outline:2px solid var(--next)}
.scroll{overflow-x:auto;border:1px solid var(--grid);border-radius:4px}
table{border-collapse:collapse;font:12px ui-monospace,monospace}
th{font-weight:500;color:var(--muted);text-align:left;white-space:pre;padding:3px 8px;background:var(--paper)}
tbody th,thead th:first-child{position:sticky;left:0;border-right:1px solid var(--grid);z-index:1}
td{padding:3px 8px;white-space:pre;border-left:1px solid var(--paper);max-width:110px;overflow:hidden;text-overflow:ellipsis}
td.right{box-shadow:inset 0 -2px var(--next)}td.query,th.query{border-left:2px solid var(--next)}
#heads{display:flex;gap:28px;align-items:flex-start;flex-wrap:wrap}
#grid{display:grid;gap:4px;align-items:center;max-height:520px;overflow:auto;padding:3px}
#grid b{font-weight:500;color:var(--muted);font-size:12px;text-align:center;padding-right:6px}
canvas{image-rendering:pixelated;background:#f4f6f8;display:block}
#grid canvas{width:54px;height:54px;cursor:pointer}#grid canvas.chosen{outline:2px solid var(--next)}
#large{width:440px;height:440px;border:1px solid var(--grid)}
#tip{position:fixed;pointer-events:none;background:#1f2933;color:#fff;padding:6px 9px;border-radius:4px;font:12px/1.5 ui-monospace,monospace;
white-space:pre;display:none;z-index:9;max-width:420px}
</style></head><body>
<h1>%%TITLE%%</h1><p>%%FACTS%%</p>
<div id="text"></div><p id="hint"></p>
<section id="lens"><h2>What it would say next, behind every layer</h2>
<p>The model's own head reads the residual stream. Darker is likelier; underlined is the token that follows in the text.</p>
<div class="scroll"><table><thead></thead><tbody></tbody></table></div></section>
<section><h2>What each head looks at</h2>
<p>A row of a square is a query, a column a key. Choose a head; hover over a token of the text to see what that query sees.</p>
<div id="heads"><div id="grid"></div><div><canvas id="large"></canvas><p id="named"></p></div></div></section>
<div id="tip"></div>
<script id="data" type="application/json">%%DATA%%</script>
<script>
const d=JSON.parse(document.getElementById("data").textContent),S=d.tokens.length;
const w=Uint8Array.from(atob(d.weights),c=>c.charCodeAt(0)),$=s=>document.querySelector(s);
const shown=t=>t.replace(/\\n/g,"\\u23ce").replace(/^ | $/g,"\\u00b7")||"\\u2205";
const at=(l,h,q,k)=>w[((l*d.heads+h)*S+q)*S+k]/255;
let chosen=[0,0],query=S-1;
const tip=$("#tip");
function say(event,text){tip.textContent=text;tip.style.display="block";
 const x=Math.min(event.clientX+14,innerWidth-tip.offsetWidth-8),y=Math.min(event.clientY+14,innerHeight-tip.offsetHeight-8);
 tip.style.left=x+"px";tip.style.top=y+"px"}
function quiet(){tip.style.display="none"}
const spans=d.tokens.map((t,i)=>{const e=document.createElement("span");e.textContent=shown(t);$("#text").append(e);
 e.onmouseenter=()=>{query=i;paint()};
 e.onmousemove=v=>say(v,`${i}: ${shown(t)}\\n${at(...chosen,query,i).toFixed(3)} of query ${query}`);e.onmouseleave=quiet;return e});
function draw(canvas,l,h){canvas.width=canvas.height=S;const c=canvas.getContext("2d"),image=c.createImageData(S,S);
 for(let q=0;q<S;q++)for(let k=0;k<S;k++){const a=Math.sqrt(at(l,h,q,k)),o=4*(q*S+k);
  image.data[o]=255-a*179;image.data[o+1]=255-a*135;image.data[o+2]=255-a*87;image.data[o+3]=255}
 c.putImageData(image,0,0)}
const grid=$("#grid");grid.style.gridTemplateColumns=`auto repeat(${d.heads},54px)`;
const cell=t=>{const e=document.createElement("b");e.textContent=t;grid.append(e)};
cell("");for(let h=0;h<d.heads;h++)cell("head "+h);
const small=[];
for(let l=0;l<d.layers;l++){cell("layer "+l);for(let h=0;h<d.heads;h++){const e=document.createElement("canvas");
 draw(e,l,h);grid.append(e);small.push([e,l,h]);e.onclick=()=>{chosen=[l,h];paint()};
 e.onmousemove=v=>say(v,`layer ${l}, head ${h}`);e.onmouseleave=quiet}}
const large=$("#large");
large.onmousemove=v=>{const r=large.getBoundingClientRect(),k=Math.min(S-1,Math.max(0,Math.floor((v.clientX-r.left)/r.width*S))),
 q=Math.min(S-1,Math.max(0,Math.floor((v.clientY-r.top)/r.height*S)));query=q;paint();
 say(v,`query ${q}: ${shown(d.tokens[q])}\\nkey   ${k}: ${shown(d.tokens[k])}\\n${at(...chosen,q,k).toFixed(3)}`)};
large.onmouseleave=quiet;
const cells=[];
if(d.rows.length){const head=document.createElement("tr");head.append(document.createElement("th"));
 d.tokens.forEach((t,i)=>{const e=document.createElement("th");e.textContent=shown(t);head.append(e);cells.push([e,i])});$("thead").append(head);
 d.rows.forEach((name,r)=>{const row=document.createElement("tr"),th=document.createElement("th");th.textContent=name;row.append(th);
  d.tokens.forEach((t,i)=>{const e=document.createElement("td"),p=d.chances[r][i],s=d.said[r][i].map(n=>d.words[n]);
   e.textContent=shown(s[0]);e.style.background=`rgba(76,120,168,${(.08+.8*p[0]).toFixed(3)})`;
   if(p[0]>.6)e.style.color="#fff";if(i+1<S&&s[0]===d.tokens[i+1])e.className="right";
   e.onmousemove=v=>say(v,`${name}, behind ${i}: ${shown(t)}\\n`+s.map((x,n)=>`${p[n].toFixed(3)}  ${shown(x)}`).join("\\n")+
    `\\nentropy ${d.entropy[r][i].toFixed(2)} nats`);
   e.onmouseenter=()=>{query=i;paint()};e.onmouseleave=quiet;row.append(e);cells.push([e,i])});
  $("tbody").append(row)})}else $("#lens").remove();
let last=null;
function paint(){const [l,h]=chosen;
 spans.forEach((e,i)=>{e.style.background=`rgba(76,120,168,${at(l,h,query,i).toFixed(3)})`;e.classList.toggle("query",i===query)});
 cells.forEach(([e,i])=>e.classList.toggle("query",i===query));
 small.forEach(([e,a,b])=>e.classList.toggle("chosen",a===l&&b===h));
 if(!last||last[0]!==l||last[1]!==h){draw(large,l,h);last=[l,h]}
 $("#named").textContent=`layer ${l}, head ${h}`;
 $("#hint").textContent=`Coloured: what query ${query}, ${shown(d.tokens[query])}, sees in layer ${l}, head ${h}.`}
paint();
</script></body></html>
"""
