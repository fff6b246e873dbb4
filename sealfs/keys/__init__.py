"""Keys for virtual machines: made, protected by the TPM, found by their key management information.

Knows no image and no FUSE. `service.KeyService` is what the commands and the console use; a console
apart has `remote.RemoteKeys` in its place, which asks `broker`. Only `tpm` speaks to a TPM, only
`swtpm` starts one, only `statedir` writes files.
"""
