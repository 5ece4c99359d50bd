"""dite_evals: how much image quality a faster model cost, in numbers that can be reproduced.

protocols   what is measured, as data           fidelity    paired: PSNR, SSIM, latent and per-step error
extractors  images → features                   fid         Fréchet distance with its interval and its limit for N → ∞
statistics  reference moments on disk           report      report.json, report.html, report.md
collect     data sets → statistics              resize      the two ways in which FIDs are quoted
"""
