"""Check a built site: every internal link and anchor leads somewhere, and no page loads anything from elsewhere.

python docs/check_links.py build/site
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Tags whose address a browser fetches by itself; links in texts may lead outside.
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
HARMLESS = ("canonical", "prev", "next", "alternate", "edit")  # relations of <link> that fetch nothing
OUTSIDE = re.compile(r"""^(https?:)?//|['"( ](https?:)?//""")
IN_STYLE = re.compile(r"""(?:url\(\s*|@import\s+)['"]?(https?:)?//""")


class Page(HTMLParser):
    """A page's anchors, its links, and the addresses that it loads."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tag = tag
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADED and LOADED[tag] in values and values.get("rel") not in HARMLESS:
            self.links.append(values[LOADED[tag]])
            self.loads.append(values[LOADED[tag]])

    def handle_data(self, data: str) -> None:
        if self.tag == "style" and (match := IN_STYLE.search(data)):
            self.loads.append(data[match.start() : match.start() + 80])
        if self.tag == "script" and "addWidgetsRenderer" in data:
            self.loads.append("https://unpkg.com (Jupyter widgets)")


def check(site: Path) -> tuple[list[str], str]:
    """One line for each fault, and what was checked."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    faults, internal = [], 0
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        faults += [
            f"{name}: loads {address}" for address in page.loads if re.search(r"^(https?:)?//|[(' \"]//", address)
        ]
        faults += [f"{name}: loads {address}" for address in page.loads if "http" in address[:20]]
        if name.name == "404.html":  # its addresses are from the server's root
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            internal += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                faults.append(f"{name}: no file {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                faults.append(f"{name}: no anchor {link}")
    for path in sorted(site.rglob("*.css")):
        if IN_STYLE.search(path.read_text(encoding="utf-8")):
            faults.append(f"{path.relative_to(site)}: loads from elsewhere")
    return list(dict.fromkeys(faults)), f"{len(pages)} pages, {internal} internal links"


if __name__ == "__main__":
    found, checked = check(Path(sys.argv[1]))
    print("\n".join([*found, f"{checked}, {len(found)} faults"]))
    sys.exit(bool(found))
