"""Storage options: those that LanceDB would ignore are refused, and the list is that of its own object_store crate."""

from __future__ import annotations

import os

import pytest

from search_r3.errors import InputError
from search_r3.index.storage.location import Remote
from search_r3.index.storage.object_store import with_environment
from search_r3.index.storage.storage_options import PREFIXES, PROVIDER


@pytest.mark.parametrize(
    ("uri", "given", "meant"),
    [
        ("s3://bucket/x", "aws_acces_key_id", '"aws_access_key_id"'),
        ("s3://bucket/x", "regoin", '"aws_region"|"region"'),
        ("s3://bucket/x", "request_timeout", '"connect_timeout"|"read_timeout"'),
        ("gs://bucket/x", "google_service_acount", '"google_service_account"'),
        ("az://bucket/x", "azure_storage_acount_name", '"azure_storage_account_name"'),
        ("gs://bucket/x", "aws_region", "LanceDB would ignore it"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_name_and_without_its_value(uri, given, meant):
    with pytest.raises(InputError, match=f'unknown storage option "{given}"; .*({meant})') as raised:
        Remote(uri, {given: "hush-hush"})
    assert "hush-hush" not in str(raised.value)


def test_known_options_are_taken_in_all_their_spellings():
    options = {"AWS_Access_Key_Id": "a", "secret_access_key": "b", "client_max_retries": "0", "headers.x-team": "c"}
    options |= {"aws_allow_http": "true", "timeout": "9s", "lance_aimd_burst_capacity": "5"}
    assert Remote("s3://bucket/x", options).given == options


@pytest.mark.parametrize("scheme", PROVIDER)
def test_each_name_of_a_provider_is_one_that_object_store_knows(scheme):
    exceptions = pytest.importorskip("obstore.exceptions")
    from obstore.store import from_url

    unknown = set()
    for name in PROVIDER[scheme]:
        known = []
        for prefix in ("", *PREFIXES[scheme]):
            try:
                from_url(f"{scheme}://bucket/x", config={prefix + name: "true"})
            except exceptions.UnknownConfigurationKeyError:
                continue
            except (exceptions.BaseError, ValueError):  # a value that makes no sense
                pass
            known.append(prefix + name)
        if not known:
            unknown.add(name)
    assert unknown <= {"storage_token", "endpoint_url_s3", "endpoint_url_sts"}  # of Lance itself, or of newer versions


def test_other_machines_get_the_credentials_and_the_region_of_this_one(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "here")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/of/this/machine")
    assert with_environment(Remote("s3://bucket/x")).given == {
        "aws_access_key_id": "key",
        "aws_secret_access_key": "secret",
        "aws_region": "here",
        "aws_endpoint_url": "http://127.0.0.1:1",
        "allow_http": "true",
    }
    options = {"access_key_id": "mine", "secret_access_key": "mine too", "region": "there"}
    assert with_environment(Remote("s3://bucket/x", options)).given == options | {
        "aws_endpoint_url": "http://127.0.0.1:1",
        "allow_http": "true",
    }
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "name")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "key")
    assert with_environment(Remote("az://bucket/x")).given == {
        "azure_storage_account_name": "name",
        "azure_storage_account_key": "key",
    }


def test_the_keys_of_an_aws_profile_reach_other_machines(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    (tmp_path / "keys").write_text("[team]\naws_access_key_id = a\naws_secret_access_key = b\nregion = there\n")
    monkeypatch.setenv("AWS_PROFILE", "team")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert with_environment(Remote("s3://bucket/x")).given == {
        "aws_access_key_id": "a",
        "aws_secret_access_key": "b",
        "aws_region": "there",
    }
