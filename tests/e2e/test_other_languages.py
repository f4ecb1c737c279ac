"""docs/other-languages.md: its JavaScript reads what the Python library packs, and its errors are the server's."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_client._connection import _SERVICE_CONFIG
from matvae_server import errors

SLICES = ((0, 128), (0, 32), (0, 2), (8, 13), (40, 61))

RUN = """
const cases = JSON.parse(require('fs').readFileSync(0)), bytes = (text) => Buffer.from(text, 'base64');
const all = (fields) => Object.fromEntries(Object.entries(fields).map(([name, text]) => [name, bytes(text)]));
console.log(JSON.stringify({
  decoded: cases.codes.map((codes) =>
    decode({ ...codes, data: bytes(codes.data) }, all(cases.quantiser)).map((row) => [...row])),
  hamming: hamming(...cases.pair.map(bytes)), squared: squaredL2([1, 2, 3], [1, 0, 7]) }));
"""


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs" / "other-languages.md").read_text()


def test_its_javascript_reads_every_precision_and_slice(page: str, repository: Path) -> None:
    node = shutil.which("node")
    if node is None:
        assert os.environ.get("CI") != "true", "CI must have node"
        pytest.skip("no node")
    golden = json.loads((repository / "proto" / "golden" / "fashion-mnist.json").read_text())
    ranges = {name: base64.b64decode(data) for name, data in golden["quantiser"].items()}
    quantiser = codec.Quantiser(**{name: np.frombuffer(data, "<f4") for name, data in ranges.items()})
    vectors = np.frombuffer(base64.b64decode(golden["codes"]["float32"]), "<f4").reshape(4, 128)
    cases, expected = [], []
    for precision, number in codec.PRECISIONS.items():
        for offset, stop in SLICES:
            own = quantiser.slice(offset, stop)
            packed = codec.pack(vectors[:, offset:stop], precision, own)
            name = pb.Precision.Name(number)
            data = base64.b64encode(packed.tobytes()).decode()
            cases.append({"data": data, "count": 4, "dimensions": stop, "offset": offset, "precision": name})
            expected.append(codec.unpack(packed, stop - offset, precision, own))
    bits = codec.pack(vectors[:2], "binary", quantiser)
    snippets = [block for block in re.findall(r"```javascript\n(.*?)```", page, re.S) if "require(" not in block]
    sent = {"codes": cases, "quantiser": golden["quantiser"], "pair": [base64.b64encode(row).decode() for row in bits]}
    done = subprocess.run(
        [node, "-e", "\n".join([*snippets, RUN])], input=json.dumps(sent), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    for case, rows, wanted in zip(cases, got["decoded"], expected, strict=True):
        assert np.array_equal(np.array(rows, np.float32), wanted), case | {"data": "..."}
    assert got["hamming"] == np.unpackbits(bits[0] ^ bits[1]).sum()
    assert got["squared"] == 20


def test_it_tells_every_reason_with_its_status(page: str) -> None:
    table = re.findall(r"^\| ([A-Z_]+) \| (`.*?`) \|", page, re.M)
    told = {reason: status for status, cell in table for reason in re.findall(r"`([A-Z_]+)`", cell)}
    assert told.keys() == set(errors.Reason)
    for kind in errors.ServiceError.__subclasses__():
        if "reason" in vars(kind):
            assert told[kind.reason] == kind.status.name


def test_its_service_config_is_the_python_clients(page: str) -> None:
    told = page.partition("const SERVICE_CONFIG = ")[2].partition(";")[0]
    assert json.loads(told) == json.loads(_SERVICE_CONFIG)
