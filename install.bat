@echo off
rem Installs heedful, if need be, and the attention backend that fits this machine. Asks nothing.
rem
rem   install.bat                 the best backend for this GPU
rem   install.bat sage            one by name; all options of `heedful install` work, such as --dry-run
rem   set PYTHON=C:\path\python.exe and then install.bat
rem
rem In ComfyUI's portable folder its python_embeded is found by itself. torch is never replaced.
setlocal
if not defined PYTHON if exist "%~dp0python_embeded\python.exe" set "PYTHON=%~dp0python_embeded\python.exe"
if not defined PYTHON if exist "%CD%\python_embeded\python.exe" set "PYTHON=%CD%\python_embeded\python.exe"
if not defined PYTHON if exist "%CD%\..\python_embeded\python.exe" set "PYTHON=%CD%\..\python_embeded\python.exe"
if not defined PYTHON set "PYTHON=python"

"%PYTHON%" -c "import sys; sys.exit(sys.version_info < (3, 10))" <nul >nul 2>nul
if not "%ERRORLEVEL%"=="0" (
    echo There is no Python 3.10 or newer at "%PYTHON%". Name one: set PYTHON=C:\path\python.exe 1>&2
    exit /b 1
)
"%PYTHON%" -c "import torch" <nul >nul 2>nul
if not "%ERRORLEVEL%"=="0" (
    echo "%PYTHON%" has no torch that can be imported. Install it first, as https://pytorch.org/get-started says for 1>&2
    echo your GPU: heedful never picks a torch for you. Then run this again. 1>&2
    exit /b 1
)
"%PYTHON%" -c "import heedful" <nul >nul 2>nul
if "%ERRORLEVEL%"=="0" goto run
if not exist "%~dp0pyproject.toml" (
    echo heedful is installed from its own repository, and this is not in one: clone it, and run its install.bat. 1>&2
    exit /b 1
)
echo Installing heedful; torch stays as it is.
set "PINS=%TEMP%\heedful-pins-%RANDOM%.txt"
"%PYTHON%" -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" <nul >"%PINS%"
"%PYTHON%" -m pip install --no-input -c "%PINS%" "%~dp0." <nul
if not "%ERRORLEVEL%"=="0" (
    del "%PINS%" 2>nul
    echo heedful could not be installed: pip's last lines above say why. Nothing else was changed. 1>&2
    exit /b 1
)
del "%PINS%" 2>nul

:run
"%PYTHON%" -m heedful install %* <nul
exit /b %ERRORLEVEL%
