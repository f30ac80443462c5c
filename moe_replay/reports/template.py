"""The report's page, as a jinja2 template."""

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.5rem 4rem; background: #fff; color: #222;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1.02rem; margin: 1.5rem 0 .25rem; }
p, li { max-width: 52rem; overflow-wrap: anywhere; }
.quiet, figcaption { color: #5c5c5c; font-size: .875rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; margin: .75rem 0; }
th, td { padding: .4rem .8rem .4rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e4e4; }
thead th { border-bottom: 2px solid #bbb; }
tbody th { font-weight: 500; min-width: 11rem; }
td small { display: block; color: #5c5c5c; font-size: .78rem; white-space: nowrap; }
td.source { white-space: nowrap; }
td .good { color: #00634a; font-weight: 600; }
td .bad { color: #a83f00; font-weight: 600; }
td .plain { color: #5c5c5c; }
figure { margin: 1.25rem 0 2rem; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { max-width: 50rem; }
code { font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { background: #f6f6f6; padding: .75rem 1rem; overflow-x: auto; white-space: pre-wrap; }
</style>
</head>
<body>
<h1>{{ title }}</h1>

{% for heading, sentences in summary %}
<h2>{{ heading }}</h2>
<ul>
{% for sentence in sentences %}
<li>{{ sentence }}</li>
{% endfor %}
</ul>
{% endfor %}

{% for group, pictures in parts %}
<h2>Methods at κ = {{ group.mini_steps }}, model {{ group.model }}</h2>
<div class="wide">
<table>
<thead>
<tr><th scope="col">measure</th>
{% for method in group.methods %}
<th scope="col">{{ method.method }}{{ " (baseline)" if method.method == group.baseline }}</th>
{% endfor %}
</tr>
</thead>
<tbody>
{% for row in group.rows %}
<tr><th scope="row">{{ row.measure }}</th>
{% for cell in row.cells %}
<td>
{% if cell.number %}
{{ shown(cell.number.value, row.unit) }}
{% if cell.number.interval %}
<small>{{ shown(cell.number.interval[0], row.unit) }} to {{ shown(cell.number.interval[1], row.unit) }}</small>
{% endif %}
{% if cell.verdict %}
<small class="{{ tone(row, cell.verdict) }}">{{ cell.verdict -}}
{% if cell.verdict in ("lower", "higher") %} ({{ shown(cell.difference.value, row.unit, True) }}){% endif %}
</small>
{% endif %}
{% else %}
-
{% endif %}
</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
<p class="quiet">Small print under a number: its {{ "%.0f"|format(100 * comparison.confidence) }} % bootstrap interval,
then how it differs from the baseline on the same seeds and iterations ({{ comparison.resamples }} resamples of seeds,
then of blocks of iterations). A difference whose interval contains 0 is <em>within noise</em>; <em>too few values</em>
stands where there are fewer than six, as of a last evaluation under few seeds. An interval of one point, as of a share
of 0, means that no value differed, not that none could. Predictors are judged against the zero predictor, not the
baseline. {{ group.tested }} differences were judged: about
{{ "%.0f"|format((1 - comparison.confidence) * group.tested) }} of as many would leave noise by chance, more with few
seeds, for which intervals are too narrow.</p>
{% for note in group.notes %}
<p class="quiet">{{ note }}</p>
{% endfor %}

{% for picture in pictures %}
<figure>
<img src="{{ picture.source }}" alt="{{ picture.alt }}">
<figcaption>{{ picture.caption }} <code>{{ picture.file.name }}</code></figcaption>
</figure>
{% endfor %}
{% endfor %}

<h2>The papers' numbers beside these</h2>
<p>Definitions are the same; model, data and scale are not. What carries over is the direction of an effect, not its
size. Paper averages of benchmarks are of AIME24, AIME25, HMMT25, AMC23 and MATH500; those here of the runs' own.</p>
<div class="wide">
<table>
<thead><tr><th scope="col">what</th><th scope="col">measured by</th><th scope="col">paper</th>
{% for group, _ in parts %}
<th scope="col">here, κ = {{ group.mini_steps }}, {{ group.model }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in papers %}
<tr><th scope="row">{{ row.what }}</th><td class="source">{{ row.source }}</td><td>{{ row.paper }}</td>
{% for ours in row.ours %}
<td>{{ ours }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>

<h2>How this was made</h2>
<pre><code>{{ command }}</code></pre>
<div class="wide">
<table>
<thead>
<tr><th scope="col">method</th><th scope="col">κ</th><th scope="col">seed</th><th scope="col">run</th></tr>
</thead>
<tbody>
{% for group, _ in parts %}
{% for method in group.methods %}
{% for run in method.runs %}
<tr><td>{{ method.method }}</td><td>{{ group.mini_steps }}</td><td>{{ run.seed }}</td>
<td><code>{{ run.run_id }}</code></td></tr>
{% endfor %}
{% endfor %}
{% endfor %}
</tbody>
</table>
</div>
</body>
</html>
"""
