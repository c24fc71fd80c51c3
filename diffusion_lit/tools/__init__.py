"""Programs beside training: `import`, `export`, `prepare`, `reference`."""
