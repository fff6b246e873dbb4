"""Keys for virtual machines: made, protected by the TPM, found by their key management information.

Knows no image and no FUSE. `service.KeyService` is what the console and the commands use; only
`tpm` speaks to a TPM, only `swtpm` starts one, only `statedir` writes files.
"""
