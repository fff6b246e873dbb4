"""Sealed network links: a VM's frames leave the host sealed, and come in verified and opened."""
