"""The look of the HTML report: one style sheet, inline, for light, dark, narrow and paper."""

from certprune.reports.look import DARK, LIGHT


def _slots(colours: tuple[str, ...]) -> str:
    return "".join(f"--s{slot}:{colour};" for slot, colour in enumerate(colours))


# The colours of verdicts: proven in teal (deeper: a dearer method), open amber, broken vermilion, wrong grey.
_LIGHT = (
    "--paper:#fdfdfc;--ink:#1d2129;--quiet:#5d6471;--rule:#dcdfe4;--wash:#f3f4f2;--accent:#00694f;--heat:#4fae91;"
    "--v0:#8fd0ba;--v1:#4fae91;--v2:#1f8468;--v3:#0b5d48;--open:#e3b44c;--broken:#cf6a3d;--wrong:#b9bdc5;"
    + _slots(LIGHT)
)
_DARK = (
    "--paper:#15171b;--ink:#e6e8ec;--quiet:#a0a7b3;--rule:#343942;--wash:#1e2127;--accent:#5fd0ae;--heat:#2f9477;"
    "--v0:#9be0c8;--v1:#57bd9d;--v2:#237f65;--v3:#1a5f4c;--open:#d9a93f;--broken:#d9754a;--wrong:#9aa1ac;"
    + _slots(DARK)
)

_RULES = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif}
main{max-width:66rem;margin:0 auto;padding:3.2rem 1.5rem 4rem}
h1,h2,h3{font-family:"Iowan Old Style",Charter,"Palatino Linotype",Palatino,Georgia,"Liberation Serif",serif;
 font-weight:600;line-height:1.2;text-wrap:balance}
h1{font-size:2.3rem;margin:.2rem 0 .8rem;overflow-wrap:anywhere}
h2{font-size:1.5rem;margin:3.2rem 0 .6rem}
h3{font-size:1.12rem;margin:2rem 0 .4rem}
p{margin:.5rem 0 .9rem;max-width:44rem}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:.86em}
a{color:var(--accent)}
.eyebrow{margin:0;color:var(--accent);font-size:.82rem;font-weight:600;letter-spacing:.09em;
 text-transform:uppercase}
.lead{font-size:1.14rem;max-width:46rem}
.quiet,figcaption,.note{color:var(--quiet)}
.note,figcaption{font-size:.88rem}
figure{margin:1rem 0 1.2rem}
figcaption{margin-top:.7rem;max-width:44rem}
.notice{border-left:3px solid var(--open);background:var(--wash);padding:.7rem 1rem;margin:1.2rem 0;
 max-width:46rem;font-size:.94rem}
.notice ul{margin:.3rem 0 0;padding-left:1.1rem}
.alarm{border-left-color:var(--broken);border-left-width:6px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(12.5rem,1fr));gap:0 2.2rem;margin:1.6rem 0 .6rem}
.card{border-top:2px solid var(--c,var(--ink));padding:.7rem 0 1rem}
.card .what{font-weight:600}
.card .figure{font-size:2.7rem;line-height:1.15;font-weight:600;letter-spacing:-.02em;
 font-variant-numeric:tabular-nums}
.card .figure small{font-size:1.2rem;font-weight:500;color:var(--quiet);letter-spacing:0}
.card p{margin:.15rem 0;font-size:.9rem;color:var(--quiet)}
.scroll{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums lining-nums}
th,td{padding:.45rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule);
 vertical-align:baseline}
th:first-child,td:first-child{padding-left:0}
th:last-child,td:last-child{padding-right:0}
thead th{font-weight:600;color:var(--quiet);font-size:.82rem;border-bottom:1.5px solid var(--ink);
 vertical-align:bottom}
tbody th{font-weight:500}
.left{text-align:left}
.interval{color:var(--quiet);font-size:.84em}
td .interval{display:block;line-height:1.3}
svg.chart{display:block;max-width:100%;height:auto;overflow:visible;font-size:13px;
 font-variant-numeric:tabular-nums}
svg.chart text{fill:var(--quiet)}
svg.chart text.name{fill:var(--ink);font-weight:600}
svg.chart text.direct{fill:var(--c)}
.grid,.axis,.mark{fill:none;stroke:var(--rule);stroke-width:1}
.axis{stroke:var(--quiet)}
.mark{stroke:var(--quiet);stroke-dasharray:2 3}
.line{fill:none;stroke:var(--c);stroke-linejoin:round}
.dot{fill:var(--c);stroke:var(--paper);stroke-width:1}
.band{fill:var(--c);opacity:.12}
.leader{stroke:var(--c);stroke-width:.7;opacity:.6;fill:none}
.narrow{display:none}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(18rem,1fr));gap:1.4rem 2rem}
.panels svg.chart{width:100%}.panels h3{margin-top:.6rem}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.3rem;margin:.6rem 0 0;padding:0;list-style:none;font-size:.86rem}
.legend li{display:flex;align-items:center;gap:.45rem}
.swatch{flex:none}
.key{width:.85rem;height:.85rem;border-radius:2px;background:var(--c);flex:none}
.bars{display:grid;grid-template-columns:minmax(6rem,max-content) 1fr;gap:.45rem 1rem;align-items:center;
 font-size:.92rem}
.bar{display:flex;height:1.5rem;gap:1px;font-variant-numeric:tabular-nums}
.bar span{background:var(--c);min-width:1px;overflow:hidden;text-align:center;font-size:.76rem;
 line-height:1.5rem;color:#10231d}
.bar .deep{color:#fff}
.open{background-image:repeating-linear-gradient(45deg,#0000 0 4px,#ffffff40 4px 8px)!important}
.scale{position:relative;height:1.4rem;font-size:.78rem;color:var(--quiet);border-top:1px solid var(--quiet)}
.scale span{position:absolute;white-space:nowrap;transform:translateX(-50%);top:.15rem}
.scale span:first-child{transform:none}.scale span:last-child{transform:translateX(-100%)}
.heat{background:color-mix(in srgb,var(--heat) var(--h),transparent)}
td.heat:last-child{padding-right:.7rem}
.heat .interval{color:inherit;opacity:.8}
details{margin:.8rem 0}
summary{cursor:pointer;color:var(--accent)}
pre{background:var(--wash);padding:.8rem 1rem;overflow-x:auto;border-radius:4px;max-width:100%}
dl{display:grid;grid-template-columns:minmax(7rem,max-content) 1fr;gap:.5rem 1.6rem;margin:.8rem 0;
 font-size:.94rem}
dt{font-weight:600}dd{margin:0;max-width:42rem;overflow-wrap:anywhere}
.facts dt{font-weight:400;color:var(--quiet)}
.facts{gap:.15rem 1.6rem;font-variant-numeric:tabular-nums}
nav ul{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1.4rem;margin:.6rem 0}
article{border-top:1px solid var(--rule);margin-top:4rem;padding-top:.5rem}
footer{margin-top:4rem;border-top:1px solid var(--rule);padding-top:.8rem;font-size:.86rem;color:var(--quiet)}
@media screen and (max-width:44rem){
 main{padding:1.6rem 1.05rem 3rem}h1{font-size:1.75rem}h2{font-size:1.3rem}.lead{font-size:1.05rem}
 .wide{display:none}.narrow{display:block}.legend.narrow{display:flex}
 .bars{grid-template-columns:1fr;gap:.1rem}.bars .bar{margin-bottom:.5rem}.bars>:empty{display:none}
 dl{grid-template-columns:1fr;gap:.1rem}dd{margin-bottom:.6rem}
 .facts{grid-template-columns:minmax(6rem,max-content) 1fr;gap:.1rem 1rem}.facts dd{margin:0}
 .stack thead{display:none}
 .stack tr{display:grid;grid-template-columns:repeat(3,1fr);gap:.35rem .6rem;padding:.7rem 0;
  border-bottom:1px solid var(--rule)}
 .stack th,.stack td{border:0;padding:0;text-align:left;white-space:normal}
 .stack tbody th{grid-column:1/-1;font-weight:600}
 .stack td::before{content:attr(data-heading);display:block;color:var(--quiet);font-size:.76rem}
 .scroll tbody th:first-child{position:sticky;left:0;background:var(--paper)}
}
@media print{
 :root{LIGHT}
 body{font-size:10.5pt}main{max-width:none;padding:0}
 figure,tr,.card,dl>*{break-inside:avoid}h2,h3{break-after:avoid}
 *{print-color-adjust:exact;-webkit-print-color-adjust:exact}
 details::details-content{content-visibility:visible;height:auto}
 .scroll{overflow:visible}table{font-size:8pt}thead th{font-size:7.5pt;white-space:normal}th,td{padding:.3rem .4rem}
 pre{white-space:pre-wrap}
}
"""

CSS = (
    f":root{{{_LIGHT}}}"
    + "".join(f".s{slot}{{--c:var(--s{slot})}}" for slot in range(len(LIGHT)))
    + f"@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    + _RULES.replace("LIGHT", _LIGHT)
)
