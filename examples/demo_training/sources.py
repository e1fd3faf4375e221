"""Which packages the demo corpus is made of: name, version, licence, and which domains each one feeds.

Every package is permissively licensed. Versions are pinned, so that a repeated run reads the same text.
"""

from dataclasses import dataclass

#: The base model's own domains, then the domains that adapters are trained for.
BASE_DOMAINS = ("python", "english")
ADAPTER_DOMAINS = ("sql", "javascript", "docs", "css")
DOMAINS = BASE_DOMAINS + ADAPTER_DOMAINS


@dataclass(frozen=True)
class Package:
    """One package of a registry. `takes` names the domains whose files are read from its archive."""

    name: str
    version: str
    licence: str
    takes: tuple[str, ...]
    registry: str = "pypi"  # pypi | npm
    sdist: bool = False  # wheels leave out documentation and test fixtures


def _wheels(licence: str, *specs: str) -> list[Package]:
    return [Package(name, version, licence, ("python",)) for name, version in (spec.split("==") for spec in specs)]


def _npm(licence: str, domain: str, *specs: str) -> list[Package]:
    split = (spec.rsplit("@", 1) for spec in specs)  # a scoped name has an @ of its own
    return [Package(name, version, licence, (domain,), registry="npm") for name, version in split]


PACKAGES: tuple[Package, ...] = (
    *_wheels(
        "BSD-3-Clause",
        *("click==8.5.1", "dask==2026.8.0", "distributed==2026.8.0", "flask==3.1.3", "httpx==0.28.1"),
        *("ipython==9.18.1", "jinja2==3.1.6", "kombu==5.7.0", "networkx==3.6.1", "pandas==3.1.1"),
        *("scikit-learn==1.9.1", "scipy==1.17.1", "starlette==1.10.0", "statsmodels==0.15.0", "sympy==1.14.0"),
        *("werkzeug==3.1.9",),
    ),
    *_wheels(
        "MIT",
        *("attrs==26.1.0", "fastapi==0.165.0", "mypy==2.4.1", "pip==26.3", "pytest==9.2.0", "rich==15.0.0"),
        *("setuptools==84.2.1", "sqlalchemy==2.1.9", "twisted==26.10.0"),
    ),
    *_wheels(
        "Apache-2.0",
        *("botocore==1.44.5", "nltk==3.10.4", "requests==2.34.2", "tornado==6.6.1", "xarray==2026.9.0"),
    ),
    *_wheels("Apache-2.0 AND MIT", "aiohttp==3.14.5"),
    *_wheels("BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0", "numpy==2.4.6"),
    Package("django", "5.2.19", "BSD-3-Clause", ("python", "english"), sdist=True),
    Package("celery", "5.7.0", "BSD-3-Clause", ("python", "english"), sdist=True),
    Package("sphinx", "9.0.4", "BSD-2-Clause", ("python", "english"), sdist=True),
    Package("awscli", "1.46.2", "Apache-2.0", ("python", "docs"), sdist=True),
    Package("sqlglot", "30.30.0", "MIT", ("python", "sql"), sdist=True),
    Package("sqlmesh", "0.236.4", "Apache-2.0", ("python", "english", "sql"), sdist=True),
    Package("ibis-framework", "12.0.0", "Apache-2.0", ("python", "sql")),
    Package("dbt-adapters", "1.24.5", "Apache-2.0", ("sql",)),
    Package("dbt-bigquery", "1.12.1", "Apache-2.0", ("sql",)),
    Package("dbt-snowflake", "1.12.4", "Apache-2.0", ("sql",)),
    Package("elementary-data", "0.26.1", "Apache-2.0", ("sql",)),
    *_npm(
        "MIT",
        "javascript",
        *("antd@4.24.16", "async@3.2.6", "backbone@1.6.1", "bluebird@3.7.2", "chart.js@4.6.1", "date-fns@4.4.0"),
        *("eslint@10.15.0", "express@5.3.0", "handlebars@4.7.10", "immutable@5.2.1", "jquery@4.0.0"),
        *("lodash@4.18.1", "marked@18.2.1", "mocha@12.0.3", "moment@2.31.0", "ramda@0.32.0", "three@0.170.0"),
        *("underscore@1.13.8", "vue@3.5.45", "webpack@5.112.2"),
    ),
    *_npm(
        "ISC",
        "javascript",
        *("d3-array@3.2.5", "d3-force@3.0.1", "d3-geo@3.1.2", "d3-hierarchy@3.1.3", "d3-scale@4.0.3"),
        *("d3-selection@3.0.1", "d3-shape@3.2.1"),
    ),
    *_npm("Apache-2.0", "javascript", "mathjs@15.2.0", "rxjs@7.8.2"),
    *_npm("BSD-2-Clause", "javascript", "leaflet@1.9.4"),
    *_npm(
        "MIT",
        "css",
        *("@picocss/pico@2.1.1", "@primer/css@22.3.2", "animate.css@4.1.1", "bootstrap@5.3.8", "bulma@1.0.4"),
        *("element-plus@2.14.8", "fomantic-ui-css@2.9.4", "foundation-sites@6.9.0", "materialize-css@1.0.0"),
        *("milligram@1.4.1", "semantic-ui-css@2.5.0", "spectre.css@0.5.9", "tachyons@4.12.0", "uikit@3.25.25"),
        "water.css@2.1.1",
    ),
    *_npm("Apache-2.0", "css", "@blueprintjs/core@6.20.0"),
    *_npm("BSD-3-Clause", "css", "purecss@3.1.0"),
)
