"""/openapi.json is true of itself; `test_fuzz.py` holds the server to it."""

import re
from typing import Any

import msgspec
import pytest

from quire.common.sampling import SamplingParams

from .fake_scheduler import FakeScheduler, http


@pytest.fixture(scope="module")
def description(shared: tuple[FakeScheduler, str]) -> dict[str, Any]:
    return http.get(f"{shared[1]}/openapi.json").json()


def test_every_reference_leads_somewhere(description: dict[str, Any]) -> None:
    references = set(re.findall(r'"\$ref":"#/([^"]+)"', msgspec.json.encode(description).decode()))
    assert len(references) > 10
    for reference in references:
        found: Any = description
        for step in reference.split("/"):
            found = found[step]
        assert found["type"] == "object"


def test_each_sampling_parameter_has_its_range(description: dict[str, Any]) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        body = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
        for name in SamplingParams.__struct_fields__:
            first, *others = body[name]["anyOf"]
            assert first["description"] and {"type": "null"} in others
    assert body["n"]["anyOf"][0]["maximum"] == 128


def test_what_a_client_may_meet_is_listed(description: dict[str, Any]) -> None:
    for path, operations in description["paths"].items():
        for operation in operations.values():
            statuses = operation["responses"].keys()
            assert {"200", "400", "403", "408", "414", "431", "500", "503"} <= statuses and "422" not in statuses
            assert (
                ("401" in statuses)
                == (path not in ("/health", "/ready", "/startup"))
                == ({"key": []} in operation["security"])
            )
            assert ("413" in statuses) == ("429" in statuses) == ("requestBody" in operation)
            assert all(told["content"] for told in operation["responses"].values())
