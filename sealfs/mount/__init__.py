"""The mount: sealed images as plain files, by way of FUSE. Decides nothing about bytes."""
