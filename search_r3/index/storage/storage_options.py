"""The storage options that LanceDB understands, by kind of storage: it ignores an unknown one without a word.

The names are those of the Rust crate object_store (https://docs.rs/object_store, `AmazonS3ConfigKey`,
`GoogleConfigKey`, `AzureConfigKey`, `ClientConfigKey`), with or without their prefix, and a few of Lance's own.
"""

from __future__ import annotations

from collections.abc import Iterable

from search_r3.errors import InputError
from search_r3.hints import nearest


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


CLIENT = _names(
    "allow_http allow_invalid_certificates connect_timeout default_content_type http1_only http2_keep_alive_interval "
    "http2_keep_alive_timeout http2_keep_alive_while_idle http2_max_frame_size http2_only pool_idle_timeout "
    "pool_max_idle_per_host proxy_ca_certificate proxy_excludes proxy_url randomize_addresses read_timeout timeout "
    "user_agent"
)
"""Options of the HTTP client."""
LANCE = _names(
    "client_max_retries client_retry_timeout download_retry_count expires_at_millis refresh_offset_millis use_opendal "
    "new_table_data_storage_version new_table_enable_stable_row_ids new_table_enable_v2_manifest_paths"
)
LANCE_PREFIXES = ("headers.", "lance_aimd_")
"""Lance's: additional HTTP headers, and its adaptive rate limit."""
PROVIDER = {
    "s3": _names(
        "access_key_id bucket bucket_name checksum_algorithm conditional_put container_authorization_token_file "
        "container_credentials_full_uri container_credentials_relative_uri copy_if_not_exists default_region "
        "disable_bulk_delete disable_tagging endpoint endpoint_url endpoint_url_s3 endpoint_url_sts imdsv1_fallback "
        "metadata_endpoint region request_payer role_arn role_session_name s3_express secret_access_key "
        "server_side_encryption session_token skip_signature sse_bucket_key_enabled sse_customer_key_base64 "
        "sse_kms_key_id token unsigned_payload virtual_hosted_style_request web_identity_token_file"
    ),
    "gs": _names(
        "application_credentials base_url bearer_token bucket bucket_name service_account service_account_key "
        "service_account_path skip_signature storage_token"
    ),
    "az": _names(
        "access_key account_key account_name authority_host authority_id bearer_token client_id client_secret "
        "container_name credential_type disable_tagging encryption_key endpoint fabric_cluster_identifier "
        "fabric_session_token fabric_token_service_url fabric_workload_host federated_token_file identity_endpoint "
        "master_key msi_endpoint msi_resource_id object_id sas_key sas_token skip_signature tenant_id token "
        "use_azure_cli use_emulator use_fabric_endpoint"
    ),
}
OF_THE_MACHINE = _names(
    "application_credentials bucket bucket_name container_authorization_token_file container_credentials_full_uri "
    "container_credentials_relative_uri container_name federated_token_file identity_endpoint imdsv1_fallback "
    "metadata_endpoint msi_endpoint msi_resource_id object_id role_arn role_session_name service_account "
    "service_account_path use_azure_cli web_identity_token_file"
)
"""Options that name a file or a role of one machine, or what the URI says: other machines have their own."""
PREFIXES = {"s3": ("aws_",), "gs": ("google_",), "az": ("azure_storage_", "azure_", "object_store_")}


def check_storage_options(uri: str, scheme: str, names: Iterable[str]) -> None:
    """Refuse an option that LanceDB would ignore. Values are not shown, as they may be secrets.

    Args:
        uri: the location, for the message.
        scheme: "s3", "gs" or "az".
        names: of the options; upper and lower case are the same, as for LanceDB.

    Raises:
        InputError: one is unknown; the message has the nearest known one.
    """
    plain = CLIENT | LANCE | PROVIDER[scheme]
    for given in names:
        name = given.lower()
        prefix = next((start for start in PREFIXES[scheme] if name.startswith(start)), "")
        if name in plain or name.removeprefix(prefix) in PROVIDER[scheme] or name.startswith(LANCE_PREFIXES):
            continue
        if name.removeprefix(prefix) == "allow_http":  # as the variable AWS_ALLOW_HTTP, which LanceDB reads
            continue
        near = nearest(name.removeprefix(prefix), plain)
        hint = "" if near is None else f'did you mean "{prefix if near in PROVIDER[scheme] else ""}{near}"? '
        raise InputError(
            f'{uri}: unknown storage option "{given}"; {hint}LanceDB would ignore it '
            "(https://docs.lancedb.com/storage/configuration)"
        )
