"""Contrastive policy gradient with a fused language-model head."""
