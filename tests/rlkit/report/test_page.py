"""The report's page in a real browser, without a network."""

import pandas as pd
import pytest
from playwright.sync_api import expect

from rlkit.commands.report import main
from rlkit.errors import UserError
from rlkit.report import build_report

HOSTILE = (
    "</script><script>document.title = 'broken out'</script>"
    "<img src=x onerror=\"document.title='broken out'\">\u2028 &amp; {{ 7 * 7 }}"
)


def visible_rows(page):
    return page.locator("#rollouts tbody tr:visible").count()


def test_page_draws_every_plot(open_page, make_run):
    page = open_page(build_report([make_run(steps=80)]))
    for i in range(page.locator(".plot").count()):
        plot = page.locator(f"#figure-{i}")
        assert plot.locator(".scatterlayer .trace path, .barlayer .trace .point path").count() > 0
    assert page.locator("#figure-0 .points path").count() == 2  # held out: before and after
    assert page.locator("#figure-2 .barlayer .point").count() == 6  # three levels, before and after


def test_filters_hide_rollouts(open_page, make_run):
    page = open_page(build_report([make_run(steps=10, tasks=30)]))
    assert visible_rows(page) == 40 + 60
    page.fill("#search", "QUESTION OF STEP 7:")
    assert visible_rows(page) == 4
    expect(page.locator("#count")).to_have_text("4 shown")
    page.fill("#search", "")
    page.select_option("#status", "invalid")
    assert (
        page.locator("#rollouts tbody tr:visible .tags", has_text="reward timed out").count()
        == visible_rows(page)
        == 1
    )
    counts = []
    for outcome in ("correct", "wrong"):
        page.select_option("#status", outcome)
        counts.append(visible_rows(page))
        assert page.locator(f"#rollouts tbody tr:visible .status.{outcome}").count() == counts[-1] > 0
    assert sum(counts) == 99
    page.select_option("#status", "")
    page.select_option("#source", "training")
    page.fill("#first", "3")
    page.fill("#last", "4")
    assert visible_rows(page) == 8


def test_column_headers_sort_the_rollouts(open_page, make_run):
    page = open_page(build_report([make_run(steps=10, evaluations=("after",))]))

    def column(number):
        return page.locator(f"#rollouts tbody td:nth-child({number})").all_inner_texts()

    tokens = page.locator("#rollouts th[data-key=length] button")
    tokens.click()
    lengths = [int(text.split()[0]) for text in column(8)]
    assert lengths == sorted(lengths) and len(set(lengths)) > 5
    tokens.click()
    assert [int(text.split()[0]) for text in column(8)] == sorted(lengths, reverse=True)
    expect(page.locator("#rollouts th[data-key=length]")).to_have_attribute("aria-sort", "descending")
    page.locator("#rollouts th[data-key=reward] button").click()
    assert column(7)[0] == "0" and column(7)[-1] == "–"  # evaluations have no reward and come last


def test_page_escapes_html_in_rollouts_and_config(open_page, make_run):
    path = make_run(steps=3, tasks=6, completion=HOSTILE.replace("{", "{{").replace("}", "}}"))
    config = path / "config.yaml"
    config.write_text(config.read_text() + "note: </pre><script>document.title='broken out'</script>\n")
    page = open_page(build_report([path]))
    assert page.title() == "causal-grpo"
    assert page.locator("#rollouts img").count() == 0
    text = page.locator("#rollouts tbody tr >> nth=0").locator("td >> nth=3").text_content()
    assert HOSTILE in text
    page.fill("#search", "</script>")
    assert visible_rows(page) == 3 * 4 + 2 * 6


def test_environment_turns_are_collapsed(open_page, make_run):
    path = make_run(steps=1, evaluations=())
    (file,) = (path / "rollouts").glob("*.parquet")
    frame = pd.read_parquet(file)
    turns = [
        {"role": "assistant", "content": "<search>owls</search>", "tokens": 5, "documents": None},
        {"role": "user", "content": f"{HOSTILE} are birds", "tokens": 9, "documents": ["d7"]},
        {"role": "assistant", "content": "birds", "tokens": 2, "documents": None},
    ]
    frame["turns"] = [turns, *[turns[2:]] * (len(frame) - 1)]
    frame.to_parquet(file)
    page = open_page(build_report([path]))
    cells = page.locator("#rollouts tbody tr >> nth=0").locator("td >> nth=3")
    assert cells.get_by_text("<search>owls</search>").is_visible()
    assert not cells.get_by_text("are birds").is_visible()
    cells.locator("summary").click()
    expect(cells.get_by_text("are birds")).to_be_visible()
    assert page.locator("#rollouts details.reply").count() == 1 and page.locator("#rollouts img").count() == 0
    page.fill("#search", "are BIRDS")
    assert visible_rows(page) == 1


def test_page_links_the_rollout_files_of_each_run(open_page, make_run, tmp_path):
    runs = [make_run(name, steps=3) for name in ("a b", "c")]
    page = open_page(build_report(runs, tmp_path / "pages" / "both.html"))
    links = page.get_by_role("link", name="3 files")
    assert [link.get_attribute("href") for link in links.all()] == ["../a%20b/rollouts/", "../c/rollouts/"]
    assert page.get_by_text(f"rlkit view {runs[1]}").is_visible()


def test_long_completions_are_collapsed(open_page, make_run):
    page = open_page(build_report([make_run(steps=1, evaluations=(), completion="word " * 300 + "end {}")]))
    completion = page.locator("#rollouts tbody tr >> nth=0").locator("td >> nth=3")
    assert not completion.get_by_text("end 0").is_visible()
    completion.locator("summary").click()
    expect(completion.locator("pre")).to_be_visible()


@pytest.mark.parametrize("scheme, dark", [("light", False), ("dark", True)])
def test_page_follows_the_color_scheme(open_page, make_run, scheme, dark):
    page = open_page(build_report([make_run(steps=2)]))
    page.emulate_media(color_scheme=scheme)
    red = page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.slice(4))")
    assert (red < 128) == dark


def test_several_runs_share_a_page(open_page, make_run):
    out = build_report([make_run(name, steps=5, tasks=12) for name in ("grpo", "dapo")])
    page = open_page(out)
    assert page.locator(".sentence").count() == 2
    assert page.locator("#figure-1 .scatterlayer .trace").count() == 2
    page.select_option("#source", "dapo, after")
    assert visible_rows(page) == 12
    assert out.name == "report.html" and (out.parent / "dapo").is_dir()


def test_page_shows_each_metric_under_its_own_name(open_page, make_run):
    """A language model and an encoder side by side, by different metrics."""
    runs = [
        make_run("lm", steps=5, tasks=12, metric="f1"),
        make_run("encoder", steps=5, tasks=12, metric="ndcg", objective="infonce"),
    ]
    page = open_page(build_report(runs))
    figures = page.locator(".figure").all_inner_texts()
    assert [figure.split()[0] for figure in figures] == ["f1", "ndcg"]
    assert "InfoNCE " in page.locator(".sentence").nth(1).inner_text()
    assert "SFT" not in page.locator("header").inner_text()
    expect(page.locator("table.evaluations th", has_text="metric")).to_have_count(1)
    rows = page.locator("table.evaluations tbody tr")
    assert [rows.nth(i).locator("td").nth(5).inner_text() for i in range(4)] == ["f1", "f1", "ndcg", "ndcg"]
    axes = page.locator(".plot .ytitle").all_text_contents()
    assert axes[:2] == ["mean f1", "mean ndcg"]
    for i in (0, 1):
        assert page.locator(f"#figure-{i} .points path").count() >= 2  # before and after
    assert "ccuracy" not in page.locator("main").inner_text()


def test_page_of_an_empty_run_has_notes(open_page, make_run):
    path = make_run(steps=1, evaluations=(), rollouts=0)
    (path / "metrics.jsonl").unlink()
    page = open_page(build_report([path]))
    assert page.locator(".notes li").count() == 3
    assert page.get_by_text("No rollouts were saved").is_visible()


def test_command_prints_the_path(make_run, tmp_path, capsys):
    assert main([str(make_run(steps=2)), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert "</html>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_build_report_rejects_other_folders(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="needs at least one run directory"):
        build_report([])
