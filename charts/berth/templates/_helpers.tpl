{{- define "berth.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "berth.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "berth.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "berth.selector" -}}
app.kubernetes.io/name: {{ include "berth.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "berth.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "berth.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "berth.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "berth.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "berth.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{- /* What the controller may do to the objects of a namespace. Secrets: get, never list or watch: a Secret is read by the name that an InstanceServer gives. */ -}}
{{- define "berth.rules" -}}
- apiGroups: [berth.dev]
  resources: [instanceservers, instanceplacements, instancemoves, instancecopies]
  verbs: [get, list, watch]
{{- /* patch: finalizers while a move or a copy is under way */}}
- apiGroups: [berth.dev]
  resources: [instanceservers, instanceplacements, instancecopies]
  verbs: [patch]
- apiGroups: [berth.dev]
  resources: [instancemoves]
  verbs: [create, patch, delete]
- apiGroups: [berth.dev]
  resources: [instanceservers/status, instanceplacements/status]
  verbs: [patch]
{{- /* by resourceVersion, which only an update compares */}}
- apiGroups: [berth.dev]
  resources: [instancemoves/status, instancecopies/status]
  verbs: [update]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
- apiGroups: [""]
  resources: [secrets]
  verbs: {{ ternary "[get, create]" "[get]" .Values.trustTokens.enabled }}
{{- end -}}
