"""Findings and reports, and how they are shown: text, Markdown, HTML and plots."""
