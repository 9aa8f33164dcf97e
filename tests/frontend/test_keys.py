"""The file of API keys: what it may say, what its mistakes are told as, and how it is read again."""

import hmac
import logging
import os
from pathlib import Path

import pytest

from quire.common.errors import ConfigError
from quire.common.keys import digest
from quire.common.messages import Quota
from quire.frontend.keys import CHECK_EVERY_S, MAX_FILE_BYTES, ApiKey, KeyRing, find, load

HASHED = digest(b"a-hashed-key")
GOOD = f"""
- name: alice
  key: "plain key"
- {{name: batch.jobs@eu-1, key: "{HASHED}", scopes: [admin, inference], requests_per_minute: 60, tokens_per_minute: 9_000}}
- {{name: prometheus, key: 'prométheus', scopes: [admin], tokens_per_minute: null, weight: 2}}
"""


def written(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "keys.yaml", GOOD)


def test_what_a_file_may_say(file: Path) -> None:
    keys = load(file)
    assert keys == (
        ApiKey(digest(b"plain key"), "alice", ("inference",), Quota()),
        ApiKey(HASHED, "batch.jobs@eu-1", ("inference", "admin"), Quota(60, 9000)),
        ApiKey(digest("prométheus".encode()), "prometheus", ("admin",), Quota(weight=2.0)),
    )
    assert "plain key" not in repr(keys)
    sent = {b"plain key": "alice", b"a-hashed-key": "batch.jobs@eu-1", "prométheus".encode(): "prometheus"}
    assert {key: found.tenant for key in sent if (found := find(keys, key))} == sent
    for wrong in (b"", b"plain", b"plain key ", b"alice", HASHED.encode(), digest(b"plain key").encode()):
        assert find(keys, wrong) is None


SECRET = "s3cret-of-alice"
ALICE = f"{{name: alice, key: {SECRET}"
MISTAKES = [
    ("", "list of keys"),
    ("[]", "list of keys"),
    ("alice: 5", "list of keys"),
    (SECRET, "list of keys"),
    (f"- name: alice\n  key: *{SECRET}", "line 2.*quotes"),
    (f"- name: alice\n  key: !{SECRET} x", "quotes"),
    (f"- name: alice\n\tkey: {SECRET}", "line 2"),
    (f"- name: alice\n  key: {SECRET}\n  key: other", "line 1"),
    (f"- {SECRET}", "entry 1.*name, key, scopes"),
    (f"- {{key: {SECRET}}}", "entry 1: name"),
    (f"- {{name: 'a b', key: {SECRET}}}", "entry 1: name"),
    (f"- {{name: 'a:b', key: {SECRET}}}", "entry 1: name"),
    (f"- {{name: 12, key: {SECRET}}}", "quotes"),
    (f"- {{name: '{'a' * 65}', key: {SECRET}}}", "entry 1: name"),
    (f"- {ALICE}, scope: [admin]}}", r"entry 1 \(alice\): there is no field 'scope'; there are name, key, scopes"),
    ("- {name: alice}", r"\(alice\): key"),
    ("- {name: alice, key: }", r"\(alice\): key"),
    ("- {name: alice, key: ''}", r"\(alice\): key"),
    ("- {name: alice, key: 12345}", r"\(alice\): key: expected text in quotes"),
    ("- {name: alice, key: ' a'}", "spaces"),
    ('- {name: alice, key: "a\\nb"}', r"\(alice\): key"),
    ("- {name: alice, key: 'sha256:abc'}", "64 hexadecimal"),
    (f"- {{name: alice, key: '{HASHED.upper().replace('SHA', 'sha')}'}}", "64 hexadecimal.*small"),
    (f"- {ALICE}, weight: 0}}", "weight: expected a number from 0.01 to 100, got 0"),
    (f"- {ALICE}, weight: .nan}}", "weight: expected a number"),
    (f"- {ALICE}, weight: true}}", "weight: expected a number"),
    (f"- {ALICE}, scopes: admin}}", "expected a list of inference and admin, got 'admin'"),
    (f"- {ALICE}, scopes: []}}", "expected a list"),
    (f"- {ALICE}, scopes: [read]}}", r"got \['read'\]"),
    (f"- {ALICE}, scopes: [[admin]]}}", "expected a list"),
    *((f"- {ALICE}, requests_per_minute: {n}}}", "requests_per_minute.*from 1 on.*leave it out") for n in ("-1", "0", "1.5", "yes", "many", 2**70)),
    (f"- {ALICE}, tokens_per_minute: -5}}", "tokens_per_minute.*got -5"),
    (f"- {ALICE}}}\n- {{name: bob, key: b}}\n- {{name: alice, key: c}}", "entries 1 and 3 have the same name"),
    (f"- {ALICE}}}\n- {{name: bob, key: {SECRET}}}", "entries 1 and 2 have the same key"),
    (f"- {ALICE}}}\n- {{name: bob, key: '{digest(SECRET.encode())}'}}", "entries 1 and 2 have the same key"),
    ("- " * 500_000, "is no YAML"),
    ("- {name: 2024-99-99, key: a}", "YAML"),
    ("#" * (MAX_FILE_BYTES + 1), "smaller"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "told"), MISTAKES, ids=[text[:40] for text, _ in MISTAKES])
def test_mistakes_are_told_with_their_place_and_without_the_key(file: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        load(written(file, text))
    assert str(file) in str(caught.value)
    assert SECRET not in str(caught.value)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 10)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "binary", tmp_path / "pipe"):
        with pytest.raises(ConfigError, match=str(path)):
            load(path)


@pytest.mark.parametrize(
    ("mode", "plain", "hashed"),
    [
        (0o600, "", ""),
        (0o400, "", ""),
        (0o640, "chmod go-rwx", ""),
        (0o644, "sha256:HEX", ""),
        (0o660, "chmod go-w", "chmod go-w"),
        (0o602, "chmod go-w", "chmod go-w"),
    ],
)
def test_others_may_not_read_keys_nor_write_any(file: Path, mode: int, plain: str, hashed: str) -> None:
    for key, told in (("plain", plain), (HASHED, hashed)):
        written(file, f"- {{name: a, key: '{key}'}}", mode)
        if told:
            with pytest.raises(ConfigError, match=told):
                load(file)
        else:
            assert len(load(file)) == 1


def tenants(ring: KeyRing, now: float) -> list[str]:
    return [key.tenant for key in ring.current(now)]


def test_keys_of_options_open_everything_and_have_no_quota() -> None:
    (plain, hashed) = KeyRing(["plain", HASHED]).current(0.0)
    assert plain == ApiKey(digest(b"plain"), digest(b"plain")[7:23]) and plain.scopes == ("inference", "admin")
    assert (hashed.digest, hashed.quota) == (HASHED, Quota())
    assert KeyRing().current(0.0) == ()


def test_a_changed_file_is_read_again_a_second_later(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    ring = KeyRing(["option"], file)
    before = tenants(ring, 100.0)
    assert before[:3] == ["alice", "batch.jobs@eu-1", "prometheus"] and len(before) == 4
    written(file, "- {name: bob, key: b}")
    assert tenants(ring, 100.0 + 0.9 * CHECK_EVERY_S) == before
    with caplog.at_level(logging.INFO):
        assert tenants(ring, 100.0 + CHECK_EVERY_S) == ["bob", before[3]]
        assert tenants(ring, 200.0) == ["bob", before[3]]
    assert [record.message for record in caplog.records] == [f"--api-keys-file {file}: read again, 1 keys"]


@pytest.mark.parametrize("harm", ["empty", "broken", "absent", "open", "replaced by a folder"])
def test_a_bad_file_is_told_once_and_changes_nothing(file: Path, caplog: pytest.LogCaptureFixture, harm: str) -> None:
    ring = KeyRing((), file)
    before = tenants(ring, 0.0)
    if harm == "open":
        file.chmod(0o644)
    elif harm in ("absent", "replaced by a folder"):
        file.unlink()
        if harm != "absent":
            file.mkdir()
    else:
        written(file, "" if harm == "empty" else "- {name")
    for second in range(1, 10):
        assert tenants(ring, 10.0 * second) == before
    assert len(caplog.records) == 1 and "stay" in caplog.records[0].message
    if file.is_dir():
        file.rmdir()
    written(file.with_name("new"), "- {name: bob, key: b}").replace(file)  # as editors and Kubernetes do
    assert tenants(ring, 200.0) == ["bob"]


def test_a_bad_file_at_the_start_is_an_error(file: Path) -> None:
    with pytest.raises(ConfigError):
        KeyRing((), written(file, ""))


def test_every_key_is_compared_whichever_it_is(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    keys = load(file)
    for sent in (b"plain key", "prométheus".encode(), b"none", b""):
        compared.clear()
        find(keys, sent)
        assert [known for _, known in compared] == [key.digest for key in keys]
