"""Which tier and which tenant an API key stands for."""

import base64
import hashlib
import hmac

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.settings import SettingsError, parse_settings
from deploy.tiers import Tier, TierKeyError, keyring
from replicas.access import ANONYMOUS, DEFAULT_TIER, Tenant

KEY = "sk-very-secret"
HASH = "sha256:" + hashlib.sha256(KEY.encode()).hexdigest()


def test_a_key_leads_to_its_tier_by_its_hash():
    found = keyring({"gold": Tier(keys=(HASH,))}).tenant(f"Bearer {KEY}")
    assert found.tier == "gold"
    assert found.name == HASH.removeprefix("sha256:")[:16]
    assert KEY not in repr(found)


def test_a_key_may_come_from_the_environment():
    ring = keyring({"gold": Tier(keys=("env:GOLD_KEY",))}, {"GOLD_KEY": KEY})
    assert ring.tenant(f"bearer {KEY}").tier == "gold"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer other", f"Basic {KEY}", KEY])
def test_anyone_else_is_of_the_default_tier(header):
    assert keyring({"gold": Tier(keys=(HASH,))}).tenant(header) == Tenant(ANONYMOUS, DEFAULT_TIER)


def test_a_key_of_letters_beyond_ascii_is_known_by_the_bytes_that_a_client_sends():
    ring = keyring({"gold": Tier(keys=("env:GOLD_KEY",))}, {"GOLD_KEY": "clé à"})
    password = base64.b64encode("me:clé à".encode()).decode()
    # Headers are read as Latin-1, whatever they are.
    for header in ("Bearer clé à".encode().decode("latin-1"), f"Basic {password}"):
        assert ring.tenant(header).tier == "gold"
    assert not ring.tenant("Bearer clé à").is_known


def test_two_keys_of_one_tier_are_two_tenants():
    ring = keyring({"gold": Tier(keys=(HASH, "env:OTHER"))}, {"OTHER": "another"})
    assert ring.tenant(f"Bearer {KEY}").name != ring.tenant("Bearer another").name


def test_every_hash_is_compared_so_that_time_tells_nothing(monkeypatch):
    compared = []

    def compare(known, digest, real=hmac.compare_digest):
        compared.append(known)
        return real(known, digest)

    monkeypatch.setattr("replicas.access.hmac.compare_digest", compare)
    ring = keyring({"gold": Tier(keys=(HASH, "env:OTHER"))}, {"OTHER": "another"})
    for key in (KEY, "another", "unknown"):
        compared.clear()
        ring.tenant(f"Bearer {key}")
        assert len(compared) == 2


def test_a_variable_that_is_not_set_is_named():
    with pytest.raises(TierKeyError, match=r"tiers.gold.keys names the environment variable NOWHERE, which is not set"):
        keyring({"gold": Tier(keys=("env:NOWHERE",))}, {})


def test_a_key_of_two_tiers_is_refused():
    with pytest.raises(TierKeyError, match="remove one of them"):
        keyring({"gold": Tier(keys=(HASH,)), "free": Tier(keys=(HASH,))})


@pytest.mark.parametrize(
    ("tiers", "sentence"),
    [
        ({"gold": {"keys": [KEY]}}, "neither sha256: with 64 hexadecimal digits nor env:"),
        ({"Gold!": {}}, '"Gold!" is not a tier\'s name'),
        ({"gold": {"share": 0}}, "tiers.gold.share is 0"),
        ({"gold": {"priorty": 1}}, "did you mean priority?"),
    ],
)
def test_mistakes_in_the_settings_are_sentences_that_do_not_repeat_a_key(tiers, sentence):
    with pytest.raises(SettingsError) as caught:
        parse_settings({"served_model_name": "m", "tiers": tiers})
    assert sentence in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(("tier", "condition"), [("gld", " whose settings have a tier gld"), ("admin", "")])
def test_a_new_keys_line_counts_where_the_settings_have_its_tier_and_that_is_said(tmp_path, tier, condition):
    arguments = ["keys", "new", "--tier", tier, "--file", str(tmp_path / "keys")]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "500"})
    assert f"a running fleet{condition} takes it at once" in result.output
