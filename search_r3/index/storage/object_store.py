"""A location on object storage as an `obstore` store: single objects with conditional writes.

LanceDB reads and writes tables, not objects, so the lease needs another client. obstore binds the Rust crate that Lance
itself is built on (object_store: the same options for S3, Google Cloud and Azure, no dependencies, 6 MB) and has
conditional writes; boto3 supports only S3. Unlike Lance, obstore does not read AWS profiles: their keys are read here
from the shared files, or by boto3 if a profile needs more than keys (SSO, a role) and boto3 is installed.
"""

from __future__ import annotations

import configparser
import os
import re
import urllib.error
import urllib.request
from contextlib import suppress
from datetime import timedelta
from typing import Any

from search_r3.errors import InputError
from search_r3.index.storage.location import Remote
from search_r3.index.storage.storage_options import OF_THE_MACHINE, PREFIXES, PROVIDER
from search_r3.optional import optional_imports

CLIENT_OPTIONS = {
    "allow_http",
    "allow_invalid_certificates",
    "connect_timeout",
    "proxy_ca_certificate",
    "proxy_excludes",
    "proxy_url",
    "read_timeout",
    "timeout",
}
"""Storage options that are settings of the HTTP client."""
BELONG_TOGETHER = (
    {"access_key_id", "secret_access_key", "session_token", "token"},
    {"default_region", "region"},
    {"endpoint", "endpoint_url", "endpoint_url_s3"},
    {"access_key", "account_key", "bearer_token", "master_key", "sas_key", "sas_token"},
)
"""If one of these is given as an option, the environment's others are not used."""
RETRIES = {"max_retries": 2, "retry_timeout": timedelta(seconds=6)}
REGION_SECONDS = 5.0


def open_objects(location: Remote, seconds: str | None = None) -> Any:
    """The objects under `location`, as an `obstore.store.ObjectStore`.

    Args:
        seconds: of a whole request, as LanceDB writes it ("60s"); by default few, for objects of some hundred bytes.

    Raises:
        InputError: obstore is not installed, or the credentials need boto3.
        obstore.exceptions.BaseError: the options are invalid; see `location.storage_errors`.
    """
    with optional_imports("search", "changing an index on object storage"):
        from obstore.exceptions import UnknownConfigurationKeyError
        from obstore.store import from_url

    given = {key.lower(): value for key, value in location.options.items()}
    client: dict[str, Any] = {key: value for key, value in given.items() if key in CLIENT_OPTIONS}
    client["timeout"] = seconds or given["connect_timeout"]
    client |= {"allow_http": _true(given.get("allow_http") or given.get("aws_allow_http"))}
    settings = {key: value for key, value in given.items() if key not in CLIENT_OPTIONS and "allow_http" not in key}
    others: Any = {"config": settings, "client_options": client, "retry_config": RETRIES}
    if location.scheme == "s3":
        others |= _aws(location, settings)
    while True:
        try:
            return from_url(str(location), **others)
        except UnknownConfigurationKeyError as error:  # an option that only Lance knows
            unknown = re.search(r"key: '([^']+)'", str(error))
            if unknown is None or settings.pop(unknown[1], None) is None:
                raise


def with_environment(location: Remote) -> Remote:
    """`location` with this process's credentials, region and endpoint as options, for processes on other machines.

    They come from the environment variables and, for S3, from the keys and the region of the AWS profile; options that
    were given have precedence. A role or a file of this machine is not passed on: the other machines use their own.
    """
    prefixes = PREFIXES[location.scheme]
    given = {name.lower() for name in location.given}
    bare = given | {name.removeprefix(prefix) for name in given for prefix in prefixes}
    taken = bare.union(*(group for group in BELONG_TOGETHER if group & bare))
    found: dict[str, str] = {}
    for prefix in prefixes:
        for name in sorted(PROVIDER[location.scheme] - OF_THE_MACHINE - taken):
            if value := os.environ.get(f"{prefix}{name}".upper()):
                found[f"{prefix}{name}"] = value
    if location.scheme == "s3":
        if "allow_http" not in bare and _true(None):
            found["allow_http"] = "true"
        settings = {name.lower(): value for name, value in location.given.items()} | found
        _aws(location, settings)
        found |= {name: value for name, value in settings.items() if name not in given}
    return Remote(str(location), found | location.given).for_writing()


def _true(value: str | None) -> bool:
    text = value if value is not None else os.environ.get("AWS_ALLOW_HTTP", "")
    return text.strip().lower() in ("true", "1", "yes", "on", "y", "t")


def _setting(settings: dict[str, str], name: str) -> str | None:
    return settings.get(name) or settings.get(f"aws_{name}") or os.environ.get(f"AWS_{name.upper()}")


def _aws(location: Remote, settings: dict[str, str]) -> dict[str, Any]:
    """Add the keys and region of the user's profile to `settings`; returns arguments for a credential provider."""
    extra: dict[str, Any] = {}
    profile = _profile()
    if not (_setting(settings, "access_key_id") or _true(_setting(settings, "skip_signature") or "")):
        if "aws_access_key_id" in profile:
            names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
            settings.update({name: profile[name] for name in names if name in profile})
        elif profile.keys() & {"sso_session", "sso_start_url", "role_arn", "credential_process"}:
            extra["credential_provider"] = _boto3_credentials()
    elsewhere = _setting(settings, "endpoint") or _setting(settings, "endpoint_url")
    if not (_setting(settings, "region") or _setting(settings, "default_region")):
        region = profile.get("region") or (None if elsewhere else _region_of(location.bucket))
        if region:
            settings["aws_region"] = region
    return extra


def _profile() -> dict[str, str]:
    """The settings of the profile AWS_PROFILE, or "default", in the AWS configuration files."""
    name = os.environ.get("AWS_PROFILE", "default")
    profile: dict[str, str] = {}
    with suppress(OSError, configparser.Error):  # no files: no profile
        for variable, file, section in (
            ("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}"),
            ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name),
        ):
            parser = configparser.RawConfigParser()
            parser.read(os.path.expanduser(os.environ.get(variable) or f"~/.aws/{file}"))
            if parser.has_section(section):
                profile.update(parser.items(section))
    return profile


def _boto3_credentials() -> Any:
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise InputError(
            "this AWS profile has no keys (it uses SSO or a role); pip install boto3, or set "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
        ) from error
    return Boto3CredentialProvider()


def _region_of(bucket: str) -> str | None:
    """The region of an Amazon bucket, which S3 reveals without credentials; None if there is no answer."""
    request = urllib.request.Request(f"https://s3.amazonaws.com/{bucket}", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=REGION_SECONDS) as answer:
            return str(answer.headers.get("x-amz-bucket-region") or "") or None
    except urllib.error.HTTPError as error:
        return error.headers.get("x-amz-bucket-region")
    except OSError:
        return None
