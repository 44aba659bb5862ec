"""The files in deploy/ fit the options of the code and one another."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from spxdask import BatchConfig

DEPLOY = Path(__file__).parents[1] / "deploy"


def load_documents(name: str) -> dict[str, dict]:
    found = yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text())
    return {document["kind"]: document for document in found}


def test_options_of_the_run_on_kubernetes_are_valid():
    run = load_documents("run.yaml")
    config = BatchConfig.from_dict(yaml.safe_load(run["ConfigMap"]["data"]["run.yaml"]))
    assert config.archive_url.startswith("s3://")
    [client] = run["Job"]["spec"]["template"]["spec"]["containers"]
    assert client["args"][:2] == ["spxdask", "run"]
    address = client["args"][client["args"].index("--scheduler") + 1]
    cluster = load_documents("cluster.yaml")["DaskCluster"]
    assert address == f"tcp://{cluster['metadata']['name']}-scheduler:8786"


def test_autoscaler_names_the_cluster():
    found = load_documents("cluster.yaml")
    assert found["DaskAutoscaler"]["spec"]["cluster"] == found["DaskCluster"]["metadata"]["name"]
    service = found["DaskCluster"]["spec"]["scheduler"]["service"]
    assert {port["port"] for port in service["ports"]} == {8786, 8787}


def test_options_of_the_run_on_ec2_are_valid():
    tree = ast.parse((DEPLOY / "aws" / "run.py").read_text())
    [call] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "config"
    ]
    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert BatchConfig.from_dict(options).keep_images is False


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.md")), ids=lambda p: p.parent.name)
def test_links_lead_to_files(path):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link
