"""The pack format: manifest, task files, fingerprints."""
